"""Which layers surgery takes: what reads a weight, what stays dense, and what is said of it."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import gemma3n, kimi_k3, llama, mixtral
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from support import TINY_LLM, assert_equal, integers

from mlx_sparse_nn import BlockSparseLinear, CSRPattern, patterns
from mlx_sparse_nn.diagnostics.summary import summary
from mlx_sparse_nn.diagnostics.verify import verify
from mlx_sparse_nn.layers.linear import QuantizedBlockSparseLinear
from mlx_sparse_nn.surgery.prune import prune
from mlx_sparse_nn.surgery.sparsify import densify, sparsify
from mlx_sparse_nn.surgery.weight_readers import who_reads_weight

TOKENS = mx.array([[5, 17, 3, 90, 41, 7, 7, 60]])


def make_llama():
    mx.random.seed(0)
    return llama.Model(llama.ModelArgs(model_type="llama", **TINY_LLM))


def make_mixtral():
    mx.random.seed(0)
    sizes = {**TINY_LLM, "num_experts_per_tok": 2, "num_local_experts": 8}
    return mixtral.Model(mixtral.ModelArgs(model_type="mixtral", **sizes))


class TestAdapters:
    @pytest.mark.parametrize(("use_dora", "kind"), [(False, LoRALinear), (True, DoRALinear)])
    def test_layers_under_them_stay_dense_and_still_fuse(self, use_dora, kind):
        model = make_llama()
        config = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
        linear_to_lora_layers(model, 2, config, use_dora=use_dora)
        done = sparsify(model, density=0.5)
        adapted = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
        for path in adapted:
            assert f"{path}.linear" not in done.sparse
            why = done.skipped[f"{path}.linear"]
            assert why.startswith(f"{kind.__name__}.")
            assert why.endswith("reads its weight: fuse adapters first, or put them on afterwards")
        assert "model.layers.0.self_attn.k_proj" in done.sparse
        before = model(TOKENS)
        for i in range(2):
            attention: Any = model.model.layers[i].self_attn
            assert type(attention.q_proj) is kind
            attention.q_proj = attention.q_proj.fuse()
        assert mx.allclose(model(TOKENS), before, rtol=1e-4, atol=1e-5).item()

    def test_adapters_of_another_project_are_seen_by_what_they_do(self):
        class Adapter(nn.Module):
            def __init__(self):
                super().__init__()
                self.base = nn.Linear(32, 32)

            def merged(self):
                base = self.base
                return base.weight + 1

        done = sparsify(nn.Sequential(Adapter(), nn.Linear(32, 32)))
        assert list(done.sparse) == ["layers.1"]
        assert done.skipped == {"layers.0.base": "Adapter.merged reads its weight"}


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.proj = nn.Linear(32, 32)
        self.other = nn.Linear(32, 32)
        self.weight = mx.ones(32)
        self.proj.weight = self.proj.weight * 0.5  # before any surgery


class Direct(Base):
    def __call__(self, x):
        return self.other(x) @ self.proj.weight.T


class ByKey(Base):
    def __call__(self, x):
        return self.other(x) @ self.proj["weight"].T


class Named(Base):
    def __call__(self, x):
        proj = self.proj
        also = proj
        return self.other(x) @ also.weight.T


class InTuple(Base):
    def __call__(self, x):
        weights = [layer.weight for layer in (self.proj, self.norm)]
        return self.other(x) @ weights[0].T


class InLoop(Base):
    def __call__(self, x):
        for _, layer in zip(range(1), [self.proj], strict=True):
            x = x @ layer.weight
        return self.other(x)


class InProperty(Base):
    @property
    def scale(self):
        return self.proj.weight.max()


class Shapes(Base):
    def __call__(self, x):
        n_out, n_in = self.proj.weight.shape  # of blocks there would be three
        return self.other(x).reshape(-1, n_out, n_in)


class Writes(Base):
    def tie(self, embedding):
        self.proj.weight = embedding


class Inherits(Direct):
    pass


READERS = [Direct, ByKey, Named, InTuple, InLoop, InProperty, Shapes, Writes, Inherits]


class Calls(Base):
    def __call__(self, x):
        x = mx.fast.rms_norm(x * self.weight, self.norm.weight, 1e-5)
        return self.other(self.proj(x.astype(self.proj.weight.dtype)))


class Outer(nn.Module):
    """Reads from further out, past lists and modules between."""

    def __init__(self):
        super().__init__()
        self.blocks: Any = [{"inner": Calls()}, {"inner": Calls()}]
        self.proj = nn.Linear(32, 32)

    def norm_of(self):
        return sum(block["inner"].other.weight.sum() for block in self.blocks)

    def first(self):
        return self.blocks[0].proj.weight


class TestReaders:
    @pytest.mark.parametrize("kind", READERS)
    def test_a_layer_whose_weight_is_read_stays_dense(self, kind):
        done = sparsify(nn.Sequential(kind(), nn.Linear(32, 32)))
        assert sorted(done.sparse) == ["layers.0.other", "layers.1"]
        (why,) = done.skipped.values()
        assert why.startswith(f"{kind.__name__}.")
        assert why.endswith(" reads its weight")

    def test_one_that_is_called_is_made_sparse(self):
        """Also beside a norm whose weight is read, a weight of the module, and the dtype."""
        done = sparsify(nn.Sequential(Calls()))
        assert sorted(done.sparse) == ["layers.0.other", "layers.0.proj"]
        assert done.skipped == {}

    def test_modules_further_out_read_too(self):
        done = sparsify(Outer(), density=0.5)
        reads = "Outer.norm_of reads its weight"
        assert done.skipped["blocks.0.inner.other"] == reads
        assert done.skipped["blocks.1.inner.other"] == reads
        # `first` goes past "inner": whatever it means, it is a `proj` of a block.
        assert "proj" in done.sparse

    def test_the_predicate_is_not_asked_for_them(self):
        asked = []
        sparsify(nn.Sequential(Direct()), predicate=lambda path, _: asked.append(path) or True)
        assert asked == ["layers.0.other"]

    def test_a_shared_layer_is_read_at_any_of_its_paths(self):
        reader = Direct()
        done = sparsify(nn.Sequential(reader.proj, reader))
        assert set(done.skipped) == {"layers.0", "layers.1.proj"}
        assert list(done.sparse) == ["layers.1.other"]

    def test_a_class_without_source_is_taken_to_call(self):
        names = {"Base": Base}
        exec("class Prompt(Base):\n    def read(self):\n        return self.proj.weight", names)
        assert len(sparsify(nn.Sequential(names["Prompt"]())).sparse) == 2

    @pytest.mark.parametrize(
        ("kind", "attribute", "method"),
        [
            (gemma3n.Gemma3nAltUp, "prediction_coefs", "predict"),
            (gemma3n.Gemma3nAltUp, "correction_coefs", "correct"),
            (kimi_k3.KimiK3DecoderLayer, "mlp_res_proj", "__call__"),
            (kimi_k3.KimiK3TextModel, "output_attn_res_proj", "__call__"),
        ],
    )
    def test_models_of_mlx_lm_that_read_a_weight(self, kind, attribute, method):
        modules = {"": kind.__new__(kind)}
        assert str(who_reads_weight(attribute, modules)) == f"{kind.__name__}.{method}"

    def test_most_layers_of_mlx_lm_are_called(self):
        done = sparsify(make_llama())
        assert len(done.sparse) == 14  # the output layer is the embedding
        assert all("reads its weight" not in why for why in done.skipped.values())


class TestWhatStaysDense:
    def test_experts_are_named_with_their_share(self):
        model = make_mixtral()
        total = summary(model).parameters
        experts = {p: m for p, m in model.named_modules() if isinstance(m, SwitchLinear)}
        done = sparsify(model)
        assert len(experts) == 6
        for path, module in experts.items():
            assert done.skipped[path] == "SwitchLinear holds 8 experts, which stay dense"
            assert done.shares[path] == pytest.approx(module.weight.size / total)
        share = sum(done.shares[path] for path in experts)
        assert share > 0.8
        said = repr(done)
        inside = "model.layers.0-1.block_sparse_moe.switch_mlp"
        names = ", ".join(f"{inside}.{name}_proj x 2" for name in ("gate", "up", "down"))
        text = f"{names} skipped ({share:.1%} of the model): SwitchLinear holds 8 experts"
        assert text in said.replace("\n  ", " ")
        assert done.model_density == pytest.approx(summary(model).density)
        assert f"{done.density:.3g} there, {done.model_density:.3g} in all" in said
        assert done.model_density > 0.9 > 0.3 >= done.density
        lines = repr(summary(model)).splitlines()
        (always,) = [line for line in lines if line.startswith("always dense")]
        assert f"SwitchLinear {share_of(model, SwitchLinear):.1%}" in always
        assert "Embedding " in always

    def test_quantized_experts_too(self):
        model = make_mixtral()
        nn.quantize(model, group_size=32)
        done = sparsify(model)
        kinds = [type(dict(model.named_modules())[path]) for path in done.skipped]
        assert QuantizedSwitchLinear in kinds
        assert sum(done.shares.values()) > 0.99
        assert not done.sparse

    def test_each_kind_has_its_reason(self):
        model = nn.Sequential(
            nn.Embedding(10, 32),
            nn.Conv2d(3, 8, 3),
            nn.ConvTranspose1d(3, 8, 3),
            nn.LSTM(32, 32),
            nn.Bilinear(8, 8, 8),
            nn.Embedding(10, 32).to_quantized(32),
            nn.LayerNorm(32),
            nn.BatchNorm(32),
            nn.Dropout(0.1),
            nn.Linear(32, 32),
        )
        done = sparsify(model)
        assert done.skipped == {
            "layers.0": "Embedding looks rows up; embeddings stay dense",
            "layers.1": "Conv2d is a convolution, which stays dense",
            "layers.2": "ConvTranspose1d is a convolution, which stays dense",
            "layers.3": "LSTM is not an nn.Linear",
            "layers.4": "Bilinear is not an nn.Linear",
            "layers.5": "QuantizedEmbedding looks rows up; embeddings stay dense",
        }

    def test_shares_are_of_the_dense_model_and_largest_first(self):
        model = nn.Sequential(
            nn.Linear(10, 32, bias=False), nn.Linear(64, 64, bias=False), nn.Embedding(32, 128)
        )
        done = sparsify(model, density=0.25)
        total = 320 + 4096 + 4096
        assert done.shares == {"layers.0": 320 / total, "layers.2": 4096 / total}
        assert done.model_density == (320 + 1024 + 4096) / total
        notes = [line for line in repr(done).splitlines() if "skipped (" in line]
        assert notes == [
            "layers.2 skipped (48.1% of the model): Embedding looks rows up; embeddings stay dense",
            "layers.0 skipped (3.8% of the model): input_dims 10 is less than block_size 32",
        ]

    def test_a_skipped_layer_at_two_paths_counts_once(self):
        odd = nn.Linear(10, 32, bias=False)
        done = sparsify(nn.Sequential(odd, nn.Linear(32, 32, bias=False), odd))
        assert set(done.skipped) == {"layers.0", "layers.2"}
        assert done.shares == {"layers.0": 320 / (320 + 1024)}
        assert repr(done).splitlines()[0].startswith("1 layer made sparse, 1 skipped: ")


def share_of(model, kind):
    rows = [row for row in summary(model).rows if row.type == kind.__name__]
    return sum(row.share for row in rows)


class TestQuantized:
    def make(self, **options):
        mx.random.seed(0)
        model = nn.Sequential(
            BlockSparseLinear(64, 96, density=0.5, **options), BlockSparseLinear(96, 64)
        )
        model.layers[0] = model.layers[0].to_quantized(group_size=32, bits=4)
        return model

    def test_sparsify_names_them(self):
        done = sparsify(self.make())
        assert done.skipped == {
            "layers.0": "QuantizedBlockSparseLinear is sparse already",
            "layers.1": "BlockSparseLinear is sparse already; prune lowers its density",
        }
        assert repr(done).splitlines()[0] == "0 layers made sparse, 2 skipped"

    def test_prune_refuses_them_with_the_way_out(self):
        model = self.make()
        held = [layer.pattern for layer in model.layers]
        with pytest.raises(ValueError, match=r"\[prune layers.0\] Quantized.* prune before nn.qu"):
            prune(model, 0.1)
        assert [layer.pattern for layer in model.layers] == held
        model.layers[0] = model.layers[0].to_block_sparse()
        assert prune(model, 0.2).after == {"layers.0": 1, "layers.1": 1}
        with pytest.raises(ValueError, match=r"\[prune\] QuantizedBlockSparseLinear keeps"):
            prune(self.make().layers[0], 0.1)

    @pytest.mark.parametrize("bias", [True, False])
    def test_densify_gives_the_same_packed_values(self, bias):
        model = self.make(bias=bias)
        model.eval()
        model.layers[0].freeze()
        x = mx.random.normal((3, 64))
        dense, expected = model.layers[0].todense(), model(x)
        assert densify(model) == ["layers.0", "layers.1"]
        layer = model.layers[0]
        assert type(layer) is nn.QuantizedLinear
        assert not layer.training
        assert layer.trainable_parameters() == {}
        packed = layer.weight, layer.scales, layer.biases
        assert_equal(mx.dequantize(*packed, layer.group_size, layer.bits), dense)
        assert mx.allclose(model(x), expected, rtol=1e-5, atol=1e-5).item()

    def test_repeated_blocks_become_a_linear_layer(self):
        pattern = CSRPattern([0, 2], [0, 0], (32, 32), 32)
        model = nn.Sequential(BlockSparseLinear(32, 32, pattern).to_quantized())
        dense = model.layers[0].todense()
        densify(model)
        assert type(model.layers[0]) is nn.Linear
        assert_equal(model.layers[0].weight, dense)

    def test_verify_and_summary_see_them(self):
        model = self.make()
        report = verify(model, mx.random.normal((3, 64)))
        assert {check.layer for check in report.checks} == {"layers.0", "layers.1"}
        assert [row.type for row in summary(model).rows] == [
            "QuantizedBlockSparseLinear",
            "BlockSparseLinear",
        ]
        assert verify(model.layers[0], mx.random.normal((3, 64))).passed


def test_densify_does_not_pull_a_layer_from_under_adapters():
    layer = BlockSparseLinear(32, 32)
    model = nn.Sequential(nn.Linear(32, 32), layer.to_lora(), BlockSparseLinear(32, 32))
    kinds = [type(m) for m in model.layers]
    with pytest.raises(ValueError, match=r"\[densify layers.1\] LoRABlockSparseLinear .* fuse\(\)"):
        densify(model)
    assert [type(m) for m in model.layers] == kinds
    model.layers[1] = model.layers[1].fuse()
    assert densify(model) == ["layers.2"]


def test_sparsify_of_a_sparse_layer_points_to_prune():
    layer = BlockSparseLinear(64, 64, density=0.75)
    with pytest.raises(TypeError, match=r"itself a BlockSparseLinear, .*; prune lowers its dens"):
        sparsify(layer, density=0.25)
    assert prune(layer, 0.25).after == {"": 1}


def test_a_quantized_layer_alone_has_no_module_around_it():
    layer = BlockSparseLinear(64, 64).to_quantized()
    assert isinstance(layer, QuantizedBlockSparseLinear)
    with pytest.raises(TypeError, match=r"\[densify\] model is itself a QuantizedBlockSparseLine"):
        densify(layer)
    with pytest.raises(TypeError, match=r"\[sparsify\] .* a QuantizedBlock.* is sparse already"):
        sparsify(layer)


def test_tied_embeddings_stay_tied():
    """A head that is the embedding has no layer to make sparse; the logits say so."""
    model = make_llama()
    assert model.args.tie_word_embeddings
    done = sparsify(model, density=1.0)
    assert done.skipped["model.embed_tokens"].startswith("Embedding looks rows up")
    assert mx.allclose(model(TOKENS), make_llama()(TOKENS), rtol=1e-3, atol=1e-5).item()


def test_the_products_of_one_layer_are_pruned_and_stored_as_those_of_a_model():
    layer = BlockSparseLinear(16, 16, patterns.banded(16, 16, 1, 4))
    layer.weight = integers(layer.weight.shape)
    report = prune(layer, 0.25)
    assert report.density == layer.density
    assert report.model_density == pytest.approx(summary(layer).density)
    assert repr(report).splitlines()[2].startswith("(itself)")
