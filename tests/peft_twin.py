"""A method held to PEFT's own: the same function, gradients and merged weights in float64, and each reads the other's files."""

from __future__ import annotations

import json
import warnings

import peft
import torch
from safetensors.torch import load_file

from deltune.adapters.attach import merge, trainable
from deltune.adapters.delta import Delta
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.files.peft import PREFIX, WHOLE
from deltune.adapters.wrapper import wrappers
from tests.tiny import tiny_model

TOLERANCE = 1e-9


def ids(model, rows=2, length=9):
    return torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))


def with_peft(model, config, shake=0.1):
    """PEFT's model with every trained tensor moved off its start."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(shake * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype))
    return wrapped


def save_peft(wrapped, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
    return folder


def read_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys")  # PEFT only warns about tensors that it misses
        return peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()


def bare(key):
    return key.removesuffix(".weight")


def our_gradients(model, name="default"):
    """Key in the file -> gradient, for every trained tensor that the file holds as it is."""
    found = {}
    for place, wrapper in wrappers(model):
        delta = wrapper.adapters[name]
        assert isinstance(delta, Delta)
        parameters = dict(delta.named_parameters())
        found |= {f"{PREFIX}{place}.{leaf}": parameters[own].grad for own, leaf in delta.leaves().items() if own in parameters}
        for bank in delta.banks_held():
            shared = dict(bank.named_parameters())
            found |= {f"{WHOLE}{leaf}": shared[own].grad for own, leaf in bank.leaves().items() if own in shared}
    return {bare(key): gradient for key, gradient in found.items()}


def their_gradients(wrapped, name="default"):
    """Key in the file -> gradient. A tensor of the whole adapter goes by its own name, not by that of a layer that holds it."""
    every = dict(wrapped.base_model.named_parameters(remove_duplicate=False))
    whole = {id(parameter): f"base_model.{key}" for key, parameter in every.items() if not key.startswith("model.")}
    return {
        bare(".".join(part for part in whole.get(id(parameter), key).split(".") if part != name)): parameter.grad
        for key, parameter in wrapped.named_parameters() if parameter.requires_grad
    }


def held_to_peft(config, folder, *, make=tiny_model, shake=0.1, merges=True, tolerance=TOLERANCE, gradients=True, changes=1e-3, ours_alone=()):
    """Assert that PEFT's adapter of this config, read by us, and ours, read by PEFT, are the same adapter.

    `make(**)` gives equal models each time. `merges`: PEFT can merge the method too. `ours_alone`: endings of keys that
    only our file holds, and PEFT passes over. Returns our model, for more checks.
    """
    theirs = with_peft(make().double(), config, shake)
    save_peft(theirs, folder / "theirs")
    ours = load_adapter(make().double(), folder / "theirs", trainable=True)
    x = ids(ours)
    answer = ours(x).logits
    assert (answer - theirs(x).logits).abs().max() < tolerance
    assert (answer - make().double()(x).logits).abs().max() > changes

    if gradients:
        answer.square().mean().backward()
        theirs(x).logits.square().mean().backward()
        expected, found = their_gradients(theirs), our_gradients(ours)
        assert found.keys() == expected.keys() and found
        for key, gradient in found.items():
            # one that does not reach a tensor is the same as one of zeros
            zero = torch.zeros(())
            mine, other = (zero if g is None else g for g in (gradient, expected[key]))
            assert (mine - other).abs().max() <= tolerance * max(1.0, float(other.abs().max())), key

    save_adapter(ours, folder / "ours")
    again = read_peft(make().double(), folder / "ours")
    assert (again(x).logits - answer).abs().max() < tolerance
    written, read = load_file(folder / "ours" / "adapter_model.safetensors"), load_file(folder / "theirs" / "adapter_model.safetensors")
    assert {key for key in written if not key.endswith(tuple(ours_alone))} == {key for key in read if "base_layer" not in key}
    fields = json.loads((folder / "ours" / "adapter_config.json").read_text())
    assert fields.keys() <= config.to_dict().keys(), fields.keys() - config.to_dict().keys()
    back = load_adapter(make().double(), folder / "ours")
    assert torch.equal(back(x).logits, ours(x).logits)

    if merges:
        merge(ours)
        expected = dict(theirs.merge_and_unload().named_parameters())
        for name, parameter in ours.named_parameters():
            assert (parameter - expected[name]).abs().max() < tolerance, name
        assert not trainable(ours)
    return back
