"""The text encoder and its tokenizers against the released code's numbers, open_clip's ids, and by hand."""

import doctest
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from imagedream_rt.engine import tokenizer as module
from imagedream_rt.engine.clip_layout import clip_names_for, clip_text_config, clip_text_from_official
from imagedream_rt.engine.errors import InputError, MissingDependency
from imagedream_rt.engine.text import TextEncoder
from imagedream_rt.engine.tokenizer import END, START, ClipTokenizer, FolderTokenizer, clean_text

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED_IDS = json.loads((FIXTURES / "open_clip_tokens.json").read_text())
BOUND = 1e-5
"""Greatest relative L2 error against the released code in float32."""

UNCLEAN = [
    ("  A  Bulldog,\n\twith   a HAT  ", [320, 15611, 267, 593, 320, 3801]),
    ("tom &amp; jerry &amp;lt;3", [2435, 261, 9164, 283, 274]),
    ("<b>bold</b> caf&eacute;", [283, 321, 285, 8911, 34308, 321, 285, 15304]),
    ("don\u2019t say \u201chi\u201d", [847, 713, 1451, 257, 1883, 257]),
    ("\ufb01ne \uff26\uff55\uff4c\uff4c width", [3797, 1476, 23571]),
    ("cafe\u0301 nai\u0308ve", [15304, 1097, 35689, 563]),
    ("\u4f60\u597d \u4e16\u754c", [47466, 254, 29290, 377, 19759, 244, 163, 243, 490]),
    ("\U0001f469\u200d\U0001f680 rocket", [26304, 13542, 8383]),
    ("it's we'll they'RE 3d 2023", [585, 568, 649, 1342, 889, 982, 274, 323, 273, 271, 273, 274]),
    ("a\x00b \x07bell", [3937, 3718]),
    ("\u0130stanbul stra\u00dfe", [328, 16384, 11231, 1894, 127, 253, 324]),
]
"""Prompts with what open_clip 2.24 (with ftfy 6) encodes them to, between start and end."""

NARROW = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.double()).norm() / want.double().norm())


def write_words(folder: Path, words: dict[str, int], config: dict[str, Any] | None = None) -> Path:
    """A folder with a word-level ``tokenizer.json``, which would itself cut and pad to two ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=2)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_pairs(folder: Path, merges: list[str]) -> Path:
    """A folder with CLIP's kind of ``vocab.json`` and ``merges.txt``: letters, last letters, pairs."""
    letters = [*"abcdelowrst!,'3é", "Ã", "©"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(pair.replace(" ", "") for pair in merges)]
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(tokens), START, END])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder


@pytest.fixture(scope="module")
def clip() -> ClipTokenizer:
    pytest.importorskip("instant_clip_tokenizer", reason="CLIP's merges: no wheel of it for this Python")
    return ClipTokenizer()


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(FIXTURES / "clip_tiny.safetensors")


@pytest.fixture(scope="module")
def official(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[2:]: tensor for name, tensor in recorded.items() if name.startswith("w.")}


@pytest.fixture
def words(tmp_path: Path) -> FolderTokenizer:
    return FolderTokenizer(
        write_words(tmp_path, {START: 1, END: 2, "<|unknown|>": 3, "red": 4, "car": 5, ",": 6, "<pad>": 7})
    )


def load(official: dict[str, Tensor], tokenizer: FolderTokenizer) -> TextEncoder:
    state = clip_text_from_official(official)
    encoder = TextEncoder.from_config(clip_text_config(state), tokenizer)
    encoder.model.load_state_dict(clip_names_for(encoder.model, state))
    return encoder.eval()


def test_context_equals_the_released_code(
    official: dict[str, Tensor], recorded: dict[str, Tensor], words: FolderTokenizer
) -> None:
    context = load(official, words).context(recorded["in.tokens"])
    assert error(context, recorded["out.text_context"]) <= BOUND


def test_the_last_official_block_is_left_out(
    official: dict[str, Tensor], recorded: dict[str, Tensor], words: FolderTokenizer
) -> None:
    poisoned = {
        name: torch.full_like(tensor, torch.nan) if name.startswith("transformer.resblocks.3.") else tensor
        for name, tensor in official.items()
    }
    context = load(poisoned, words).context(recorded["in.tokens"])
    assert error(context, recorded["out.text_context"]) <= BOUND


def test_forward_is_the_context_of_the_ids(official: dict[str, Tensor], words: FolderTokenizer) -> None:
    encoder = load(official, words)
    ids = torch.zeros(2, 77, dtype=torch.int64)
    ids[0, :4] = torch.tensor([1, 4, 5, 2])
    ids[1, :2] = torch.tensor([1, 2])
    assert torch.equal(encoder(["Red car", ""]), encoder.context(ids))


def test_renaming_is_pure_and_passes_over_the_image_tower(official: dict[str, Tensor]) -> None:
    before = {name: (id(tensor), tensor.shape) for name, tensor in official.items()}
    renamed = clip_text_from_official(official)
    assert {name: (id(tensor), tensor.shape) for name, tensor in official.items()} == before
    assert renamed["text_model.final_layer_norm.weight"] is official["ln_final.weight"]
    biases = [renamed[f"text_model.encoder.layers.1.self_attn.{letter}_proj.bias"] for letter in "qkv"]
    assert torch.equal(torch.cat(biases), official["transformer.resblocks.1.attn.in_proj_bias"])
    assert len(renamed) == 3 * 16 + 4
    stray = clip_text_from_official({**official, "transformer.extra": torch.zeros(1)})
    assert "text_model.transformer.extra" in stray


def test_configuration_is_read_off_the_shapes(official: dict[str, Tensor]) -> None:
    config = clip_text_config(clip_text_from_official(official))
    sizes = (
        "vocab_size",
        "max_position_embeddings",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
    )
    assert [config[name] for name in sizes] == [600, 77, 128, 512, 2]
    assert (config["num_hidden_layers"], config["hidden_act"]) == (3, "gelu")


@pytest.mark.parametrize("prefix", ["text_model.", ""], ids=["transformers 4", "transformers 5"])
def test_names_of_either_transformers_generation_load(
    official: dict[str, Tensor], words: FolderTokenizer, prefix: str
) -> None:
    state = {
        prefix + name.removeprefix("text_model."): tensor
        for name, tensor in clip_text_from_official(official).items()
    }
    state[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
    model = TextEncoder.from_config(clip_text_config(state), words).model
    assert clip_names_for(model, state).keys() == model.state_dict().keys()


def test_a_tokenizer_larger_than_the_model_is_refused(words: FolderTokenizer) -> None:
    with pytest.raises(InputError, match="knows 8 tokens, the text encoder 7"):
        TextEncoder.from_config({**NARROW, "vocab_size": 7}, words)


@pytest.mark.parametrize("case", RECORDED_IDS, ids=[case["prompt"][:20] or "empty" for case in RECORDED_IDS])
def test_ids_equal_open_clips(clip: ClipTokenizer, case: dict[str, Any]) -> None:
    encoder = TextEncoder.from_config({**NARROW, "vocab_size": clip.size}, clip)
    want = torch.zeros(1, 77, dtype=torch.int64)
    want[0, : len(case["ids"])] = torch.tensor(case["ids"])
    assert torch.equal(encoder.tokenize([case["prompt"]]), want)


@pytest.mark.parametrize(("prompt", "ids"), UNCLEAN, ids=[ascii(prompt) for prompt, _ in UNCLEAN])
def test_unclean_prompts_have_open_clips_ids(clip: ClipTokenizer, prompt: str, ids: list[int]) -> None:
    assert clip.encode(clean_text(prompt)) == ids


def test_half_a_surrogate_pair_is_replaced(clip: ClipTokenizer) -> None:
    assert clip.encode(clean_text("caf\udce9")) == clip.encode("caf\ufffd")


def test_control_tokens_cannot_be_written_in_a_prompt(clip: ClipTokenizer) -> None:
    ids = clip.encode(clean_text(f"{START} a {END}"))
    assert max(ids) < min(clip.bos_id, clip.eos_id)


def test_without_the_package_one_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "instant_clip_tokenizer", None)
    with pytest.raises(MissingDependency, match="pip install instant-clip-tokenizer"):
        ClipTokenizer()


def test_a_long_prompt_is_cut_before_the_end_token(tmp_path: Path) -> None:
    words = FolderTokenizer(
        write_words(
            tmp_path, {START: 0, END: 1, "<|unknown|>": 2, "red": 3, "<pad>": 4}, {"pad_token": "<pad>"}
        )
    )
    encoder = TextEncoder.from_config({**NARROW, "vocab_size": 5, "max_position_embeddings": 6}, words)
    ids = encoder.tokenize(["red red red red red", "red red red red", "RED blue", ""])
    assert ids.tolist() == [[0, 3, 3, 3, 3, 1], [0, 3, 3, 3, 3, 1], [0, 3, 2, 1, 4, 4], [0, 1, 4, 4, 4, 4]]
    assert encoder.tokenize([]).shape == (0, 6)


def test_control_tokens_are_those_that_the_settings_name(tmp_path: Path) -> None:
    settings = {"bos_token": "[a]", "eos_token": {"content": "[b]", "lstrip": False}, "pad_token": None}
    words = FolderTokenizer(write_words(tmp_path, {"<|unknown|>": 0, "[a]": 1, "[b]": 2}, settings))
    assert (words.bos_id, words.eos_id, words.pad_id, words.size) == (1, 2, 0, 3)


def test_byte_pairs_merge_in_the_order_of_the_file(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path, ["l o", "lo w</w>", "lo w", "e r</w>", "Ã ©</w>", "' s</w>"])
    vocabulary = json.loads((folder / "vocab.json").read_text())
    pairs = FolderTokenizer(folder)
    cases = {
        "low lower": ["low</w>", "low", "er</w>"],
        "lo": ["l", "o</w>"],
        "33low!": ["3</w>", "3</w>", "low</w>", "!</w>"],
        "é": ["Ã©</w>"],
        "low's,": ["low</w>", "'s</w>", ",</w>"],
    }
    for text, tokens in cases.items():
        assert pairs.encode(text) == [vocabulary[token] for token in tokens], text
    assert (pairs.bos_id, pairs.eos_id, pairs.pad_id) == (vocabulary[START], vocabulary[END], 0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), "not both"),
        (lambda folder: (folder / "merges.txt").write_text("#version: 0.2\nl o w\n"), "cannot be read"),
        (lambda folder: (folder / "merges.txt").write_text("#version: 0.2\nx y\n"), "cannot be read"),
        (lambda folder: (folder / "vocab.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "vocab.json").write_text('{"l": 0, "o": 1, "lo": 2}'), "no token"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\x00\xff"), "cannot be read"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "cannot be read"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"pad_token": {"x": 1}}'),
            "cannot be read",
        ),
        (lambda folder: (folder / "tokenizer_config.json").write_text('{"bos_token": "?"}'), "no token"),
    ],
)
def test_malformed_tokenizer_files_are_one_clear_error(tmp_path: Path, spoil: Any, message: str) -> None:
    folder = write_pairs(tmp_path, ["l o"])
    FolderTokenizer(folder)
    spoil(folder)
    with pytest.raises(InputError, match=message):
        FolderTokenizer(folder)


def test_a_word_without_an_id_is_a_clear_error(tmp_path: Path) -> None:
    words = FolderTokenizer(write_words(tmp_path, {START: 0, END: 1, "red": 2}))
    assert words.encode("red") == [2]
    with pytest.raises(InputError, match="cannot encode 'blue'"):
        words.encode("blue")


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(module).attempted > 0
    assert doctest.testmod(module).failed == 0


def test_importing_the_encoders_loads_no_model_library() -> None:
    program = (
        "import sys, imagedream_rt.engine.text, imagedream_rt.engine.vision, imagedream_rt.engine.vae\n"
        "heavy = {'transformers', 'diffusers', 'torchvision', 'tokenizers', 'instant_clip_tokenizer'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
