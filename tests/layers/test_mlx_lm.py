"""Small random models of mlx-lm, made sparse: mlx-lm's own tools go on working with them."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from support import assert_equal, flatten
from tiny_models import (
    CONFIGS,
    close,
    code_of,
    config_of,
    layers_of,
    make_dense,
    make_sparse,
    save_sparse,
)

from mlx_sparse_nn import BlockSparseLinear
from mlx_sparse_nn.layers.linear import QuantizedBlockSparseLinear
from mlx_sparse_nn.layers.lora import LoRABlockSparseLinear
from mlx_sparse_nn.surgery.restore import restore
from mlx_sparse_nn.surgery.sparsify import densify

TOKENS = mx.array([[5, 17, 3, 90, 41, 7, 7, 60]])
LORA = {"rank": 4, "scale": 2.0, "dropout": 0.0}


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


class TestGeneration:
    def test_logits_are_those_of_the_masked_dense_model(self, name):
        model = make_sparse(name)
        logits = model(TOKENS)
        densify(model)
        assert close(logits, model(TOKENS))
        assert not close(logits, make_dense(name)(TOKENS))

    def test_logits_with_the_cache_are_those_without(self, name):
        model = make_sparse(name)
        cache, parts, start = make_prompt_cache(model), [], 0
        for length in (3, 1, 2, 1, 1):
            parts.append(model(TOKENS[:, start : start + length], cache=cache))
            start += length
        assert close(mx.concatenate(parts, axis=1), model(TOKENS))

    def test_generate_step_takes_the_most_likely_tokens(self, name):
        model = make_sparse(name)
        tokens = TOKENS
        for token, _ in generate_step(TOKENS[0], model, max_tokens=6):
            expected = mx.argmax(model(tokens)[0, -1])
            assert token == expected.item()
            tokens = mx.concatenate([tokens, expected[None, None]], axis=1)
        assert tokens.shape == (1, 14)

    # mlx-lm does not quantize the cache of Gemma's sliding windows.
    @pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
    def test_a_quantized_cache(self, name):
        model = make_sparse(name)
        steps = generate_step(
            TOKENS[0], model, max_tokens=4, kv_bits=8, kv_group_size=32, quantized_kv_start=0
        )
        assert len(list(steps)) == 4


class TestSaveAndLoad:
    def test_the_documented_way(self, tmp_path, name):
        saved = make_sparse(name)
        save_sparse(saved, tmp_path, config_of(name))
        model, _ = load_model(tmp_path, trust_remote_code=True)
        assert_equal(model(TOKENS), saved(TOKENS))
        assert layers_of(model, BlockSparseLinear) == layers_of(saved, BlockSparseLinear)

    def test_restore_needs_no_file(self, tmp_path, name):
        saved = make_sparse(name)
        save_model(tmp_path, saved)
        assert_equal(restore(make_dense(name, seed=1), tmp_path)(TOKENS), saved(TOKENS))

    def test_mlx_lm_refuses_a_sparse_checkpoint_without_the_file(self, tmp_path):
        save_model(tmp_path, make_sparse("llama"))
        save_config(config_of("llama"), tmp_path / "config.json")
        with pytest.raises(ValueError, match=r"parameters not in model"):
            load_model(tmp_path)

    def test_bfloat16(self, tmp_path, name):
        saved = make_sparse(name)
        saved.set_dtype(mx.bfloat16)
        save_sparse(saved, tmp_path, config_of(name))
        model, _ = load_model(tmp_path, trust_remote_code=True)
        assert model(TOKENS).dtype == mx.bfloat16
        assert_equal(model(TOKENS), saved(TOKENS))


def adapt(model, num_layers=2):
    """What ``mlx_lm.lora`` does."""
    model.freeze()
    linear_to_lora_layers(model, num_layers, LORA)
    return model


def give_adapters_values(model):
    for _, module in model.named_modules():
        if hasattr(module, "lora_b"):
            module.lora_b = mx.random.normal(module.lora_b.shape) * 0.1


class TestLoRA:
    def test_adapters_start_without_effect_and_alone_are_trainable(self, name):
        model = make_sparse(name)
        logits = model(TOKENS)
        adapt(model)
        assert_equal(model(TOKENS), logits)
        trainable = [path for path, _ in tree_flatten(model.trainable_parameters())]
        assert len(trainable) == 2 * 14
        assert {path.split(".")[-1] for path in trainable} == {"lora_a", "lora_b"}
        assert len(layers_of(model, LoRABlockSparseLinear)) == 14

    def test_only_the_last_layers_and_the_named_keys(self):
        model = make_sparse("llama").freeze()
        linear_to_lora_layers(model, 1, {**LORA, "keys": ["self_attn.q_proj"]})
        assert layers_of(model, LoRABlockSparseLinear) == ["model.layers.1.self_attn.q_proj"]

    def test_training_saving_and_loading_adapters(self, tmp_path, name, capsys):
        """``mlx_lm.tuner.train`` compiles the step; its adapter file fits a fresh model."""
        model = adapt(make_sparse(name))
        frozen = {
            path: mx.array(value)
            for path, value in flatten(model.parameters())
            if "lora" not in path
        }
        data = [(TOKENS[0].tolist(), 0)] * 2
        losses = []

        class Record(TrainingCallback):
            def on_train_loss_report(self, train_info):
                losses.append(train_info["train_loss"])

        args = TrainingArgs(
            batch_size=2,
            iters=8,
            steps_per_report=1,
            adapter_file=str(tmp_path / "adapters.safetensors"),
        )
        train(model, optim.Adam(1e-2), data, args=args, training_callback=Record())
        assert losses[-1] < losses[0] - 0.1
        after = dict(tree_flatten(model.parameters()))
        for path, value in frozen.items():
            assert_equal(after[path], value)

        config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": LORA}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        fresh = load_adapters(make_sparse(name), tmp_path)
        assert_equal(fresh.eval()(TOKENS), model.eval()(TOKENS))

    def test_fuse(self, name):
        model = adapt(make_sparse(name))
        give_adapters_values(model)
        logits = model(TOKENS)
        fused = [
            (n, m.fuse(dequantize=False)) for n, m in model.named_modules() if hasattr(m, "fuse")
        ]
        model.update_modules(tree_unflatten(fused))
        assert close(model(TOKENS), logits)
        assert not layers_of(model, BlockSparseLinear)

    def test_the_documented_fuse_keeps_the_pattern(self):
        model = adapt(make_sparse("llama"))
        give_adapters_values(model)
        patterns = [m.pattern for _, m in model.named_modules() if isinstance(m, BlockSparseLinear)]
        logits = model(TOKENS)
        exec(code_of("LoRA"), {"model": model})
        assert not layers_of(model, LoRABlockSparseLinear)
        assert patterns == [
            m.pattern for _, m in model.named_modules() if isinstance(m, BlockSparseLinear)
        ]
        assert not close(model(TOKENS), logits)


class TestQuantization:
    def test_quantized_logits_stay_near(self, name):
        model = make_sparse(name)
        logits = model(TOKENS)
        nn.quantize(model, group_size=32, bits=8)
        assert len(layers_of(model, QuantizedBlockSparseLinear)) == 14
        assert not layers_of(model, BlockSparseLinear | nn.Linear)
        assert mx.abs(model(TOKENS) - logits).max() < 0.03 * mx.abs(logits).max()

    def test_save_and_load(self, tmp_path, name, capsys):
        """As the page shows it."""
        names = {"model": make_sparse(name), "config": config_of(name)}
        exec(code_of("Quantization"), names)
        saved, config = names["model"], names["config"]
        assert len(layers_of(saved, QuantizedBlockSparseLinear)) == 14
        save_sparse(saved, tmp_path, config)
        model, _ = load_model(tmp_path, trust_remote_code=True)
        assert_equal(model(TOKENS), saved(TOKENS))
        assert layers_of(model, nn.QuantizedEmbedding) == ["model.embed_tokens"]

    def test_bits_of_its_own_for_each_layer(self, tmp_path, name, capsys):
        """The configuration then names the layers, and mlx-lm quantizes them by it as it loads."""

        def bits_of(path, module):
            return {"group_size": 32, "bits": 6 if "down_proj" in path else 3, "mode": "affine"}

        saved, config = quantize_model(
            make_sparse(name), config_of(name), 32, 4, quant_predicate=bits_of
        )
        save_sparse(saved, tmp_path, config)
        model, _ = load_model(tmp_path, trust_remote_code=True)
        assert_equal(model(TOKENS), saved(TOKENS))
        assert len(layers_of(model, QuantizedBlockSparseLinear)) == 14

    def test_sparse_layers_quantized_alone(self, tmp_path):
        """The configuration names no quantization: mlx-lm then leaves all layers as they are."""
        saved = make_sparse("llama")
        nn.quantize(saved, 32, 8, class_predicate=lambda _, m: isinstance(m, BlockSparseLinear))
        save_sparse(saved, tmp_path, config_of("llama"))
        model, _ = load_model(tmp_path, trust_remote_code=True)
        assert_equal(model(TOKENS), saved(TOKENS))

    def test_the_documented_way_to_dequantize(self):
        model = make_sparse("llama")
        nn.quantize(model, 32, 8)
        logits = model(TOKENS)
        exec(code_of("Quantization", 1), {"model": model})
        assert len(layers_of(model, BlockSparseLinear)) == 14
        assert close(model(TOKENS), logits)

    def test_a_tool_of_dense_layers_is_told_what_to_do(self):
        layer = make_sparse("llama").layers[0].mlp.up_proj
        assert not hasattr(layer, "input_feat")
        with pytest.raises(AttributeError, match=r"no attribute 'input_feat'.*densify"):
            _ = layer.input_feat

    def test_quantize_model_leaves_out_layers_whose_blocks_are_too_small(self, capsys):
        model, _ = quantize_model(make_sparse("llama"), config_of("llama"), 64, 4)
        assert len(layers_of(model, BlockSparseLinear)) == 14
        assert layers_of(model, nn.QuantizedLinear) == ["lm_head"]

    def test_lora_over_quantized_layers(self, name):
        model = make_sparse(name)
        nn.quantize(model, group_size=32, bits=8)
        adapt(model)
        loss = lambda x: nn.losses.cross_entropy(model(x)[:, :-1], x[:, 1:], reduction="mean")
        optimizer = optim.Adam(1e-2)
        losses = []
        for _ in range(4):
            value, grads = nn.value_and_grad(model, loss)(TOKENS)
            optimizer.update(model, grads)
            losses.append(value.item())
        assert losses[-1] < losses[0]
        assert {path.split(".")[-1] for path, _ in tree_flatten(grads)} == {"lora_a", "lora_b"}
