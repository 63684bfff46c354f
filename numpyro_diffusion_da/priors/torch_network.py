"""PyTorch networks as JAX functions, whose parameters are arrays of a pytree.

    module.load_state_dict(torch.load("checkpoint.pt"))
    network = ndda.priors.TorchNetwork(module.eval())
    prior = ndda.DenoiserPrior(network, ndda.priors.parametrization.Preconditioned(), layout=(40,), residual=True, ...)

PyTorch and torchax are imported when the first network is made, by nothing else of this package. torchax runs the
module with JAX arrays in place of tensors, so JAX traces, compiles, batches and differentiates it as a network of its
own. Import of torchax leaves one trace in PyTorch: the unused backend "privateuseone" is from then on called "jax".
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.metadata
import inspect
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from numpyro_diffusion_da.arguments import require
from numpyro_diffusion_da.priors.network import CALLABLE

if TYPE_CHECKING:
    import torch

INSTALL = "pip install 'numpyro-diffusion-da[torch]'"


class TorchNetwork(eqx.Module):
    """JAX function that runs a PyTorch module; the module's parameters and buffers are arrays of its pytree.

    The result can be jitted, vmapped and differentiated in both modes. It takes what the module takes, one or more
    arrays, and is the `network` of a `DenoiserPrior`, which calls it with the noised latent, the index of the noise
    level and the conditioning.

    The arrays are copied, so training may go on with the module. The structure of the module is copied too. Each call
    runs a fresh copy of the structure: a buffer or an attribute that the module changes in a call is not changed here.

    All floating parameters of one type, such as half precision, make the floating inputs be cast to this type, because
    PyTorch demands it. A module that mixes types gets its inputs as they are. The types are those of JAX: without
    `jax_enable_x64` parameters and computations in double precision become single precision.

    Args:
        module: the module in eval mode, with its trained parameters.
        call: function (module, *inputs) -> output, written for PyTorch, that calls the module: it adds and removes
            batch axes, joins the conditioning to the state, embeds the noise level, or gives a fixed label. By default
            the module is called with all inputs. Tensors that the function itself holds must be constants, because they
            are neither arguments of the compiled program nor in the prior's checksum.

    Attributes:
        arrays: parameters and buffers by their names in the module. A parameter that is tied to another is there once.
        program: the structure of the module, a static part of the pytree that compares by identity.

    Raises:
        ImportError: PyTorch or torchax is not installed, or these versions do not work together.
        TypeError: `module` is not a Python module of PyTorch, or `call` is not a function.
        ValueError: the module is in train mode, or a parameter is NaN.
    """

    arrays: dict[str, Array]
    program: _Program = eqx.field(static=True)

    def __init__(self, module: torch.nn.Module, call: Callable[..., Any] | None = None) -> None:
        torch = import_torch().torch
        require(module, torch.nn.Module, self, "module", "module, a torch.nn.Module in eval mode")
        name = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"TorchNetwork got {name}, a TorchScript module, whose operations cannot be replaced; give the module "
                "that it was made from, with its state_dict loaded."
            )
        if call is not None:
            require(
                call, CALLABLE, self, "call", "lambda module, z, level, x: module(z[None], level[None], x[None])[0]"
            )
        training = [path for path, part in module.named_modules() if part.training]
        if training:
            where = f"its part '{training[0]}'" if training[0] else "it"
            raise ValueError(
                f"TorchNetwork got {name} in train mode ({where} is), in which dropout is random and batch "
                "normalization depends on the batch; call module.eval() first."
            )
        tensors = _tensors(torch, module)
        for path, tensor in tensors.items():
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise ValueError(
                    f"TorchNetwork got {name} with NaN in '{path}'; give the parameters of a training that converged."
                )
        self.arrays = {path: _array(tensor) for path, tensor in tensors.items()}
        types = {self.arrays[path].dtype for path, _ in module.named_parameters() if tensors[path].is_floating_point()}
        self.program = _Program(name, _skeleton(torch, module, tensors), call, types.pop() if len(types) == 1 else None)

    def __call__(self, *inputs: PyTree) -> PyTree:
        """Output of the module, of one array or a pytree of arrays.

        Args:
            *inputs: what the module or `call` takes: arrays, pytrees of arrays, None, or other values.

        Raises:
            TypeError: the module does not take this number of inputs, or its output is not made of arrays.
            NotImplementedError: torchax has no lowering for an operation, which the message names, or the module
                chooses its operations by the values of its inputs.
            ValueError: the module draws random numbers, or holds a tensor that is no parameter, buffer or attribute.
        """
        return self.program.run(self.arrays, inputs)


class _Program:
    """Static part of a network: the module without its parameters. It compares and hashes by identity, as jit needs.

    Args:
        name: name of the module's class, for messages.
        skeleton: the module, with tensors that have shapes and no values.
        call: function that calls the module, or None.
        dtype: type that floating inputs are cast to, or None.
    """

    def __init__(self, name: str, skeleton: Any, call: Callable[..., Any] | None, dtype: Any) -> None:
        self.name, self.dtype = name, dtype
        self.skeleton, self.call = skeleton, call
        if call is None:
            self.signature, self.called = _signature(skeleton.forward), f"{name}.forward"
        else:
            self.signature, self.called = _signature(functools.partial(call, skeleton)), "call, after the module,"

    def run(self, arrays: dict[str, Array], inputs: tuple[PyTree, ...]) -> PyTree:
        """Run the module with arrays in place of its tensors."""
        if self.signature is not None:
            try:
                self.signature.bind(*inputs)
            except TypeError as error:
                raise TypeError(
                    f"TorchNetwork of {self.name} got {len(inputs)} inputs, but {self.called} takes {self.signature} "
                    f"({error}); pass call=, a function (module, *inputs) -> output that gives the module what it "
                    "needs."
                ) from None
        torch, environment, missing = import_torch()
        inputs = jax.tree.map(self._as_input, inputs)
        module = _called(torch, copy.deepcopy(self.skeleton), self.call)
        try:
            with _as_jax(torch, environment):
                tensors = environment.j2t_iso({f"module.{path}": value for path, value in arrays.items()})
                given = jax.tree.map(environment.j2t_iso, inputs)
                output = environment.t2j_iso(torch.func.functional_call(module, tensors, given))
        except missing as error:
            raise NotImplementedError(
                f"the PyTorch module {self.name} uses an operation that torchax cannot run in JAX ({error}); write "
                "that part of the module with other operations, or try a newer torchax."
            ) from error
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
            raise NotImplementedError(
                f"the PyTorch module {self.name} chooses operations or shapes by the values of its inputs, or gives "
                f"them to NumPy, which a compiled program cannot ({type(error).__name__}); use torch.where, and "
                "functions of PyTorch."
            ) from error
        except AssertionError as error:
            if "torchax environment" in str(error):
                raise NotImplementedError(
                    f"the PyTorch module {self.name} uses an operation that is not PyTorch's own, such as a kernel of "
                    "another package, which torchax cannot run in JAX; write it with operations of PyTorch."
                ) from error
            if "Expect a Tensor" not in str(error):
                raise
            raise ValueError(
                f"the PyTorch module {self.name} computes with a tensor that is neither an input, nor a parameter, a "
                "buffer or an attribute of a module, such as one in a list, in a closure, or made with device='cpu'; "
                "register it with register_buffer, or make it on the device of the input."
            ) from error
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}" if eqx.is_array(x) else x, inputs)
            error.add_note(f"This error is of the PyTorch module {self.name}, called with {shapes}.")
            raise
        for leaf in jax.tree.leaves(output):
            if not eqx.is_array_like(leaf):
                raise TypeError(
                    f"the PyTorch module {self.name} gave a {type(leaf).__name__}, expected an array or a pytree of "
                    "arrays; pass call=, a function (module, *inputs) -> output that selects it."
                )
        return output

    def _as_input(self, value: Any) -> Any:
        """An input as an array of the type that the module takes; what is no array stays as it is."""
        if not eqx.is_array_like(value):
            return value
        value = jnp.asarray(value)
        cast_ = self.dtype is not None and jnp.issubdtype(value.dtype, jnp.floating)
        return value.astype(self.dtype) if cast_ else value


class Torch(NamedTuple):
    """Modules and the environment of PyTorch and torchax that a network runs with.

    Attributes:
        torch: the module `torch`.
        environment: environment of torchax of our own, apart from the default one of other programs.
        missing: class of torchax's error for an operation that it cannot run.
    """

    torch: Any
    environment: Any
    missing: type[Exception]


@functools.cache
def import_torch() -> Torch:
    """Import PyTorch and torchax, and make the environment in which all modules run.

    Raises:
        ImportError: one of the two is not installed, or the two versions do not work together. The message says what
            to install.
    """
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise ImportError(f"TorchNetwork needs PyTorch, which is not installed; {INSTALL}.") from error
    try:
        with _settings_kept(torch):
            importlib.import_module("torchax")
            tensor = importlib.import_module("torchax.tensor")
            config = importlib.import_module("torchax.config")
            # DLPack would share the memory of the tensors, which training changes in place.
            environment = tensor.Environment(config.Configuration(use_dlpack_for_data_conversion=False))
    except ModuleNotFoundError as error:
        if error.name != "torchax":
            raise
        raise ImportError(f"TorchNetwork needs torchax, which is not installed; {INSTALL}.") from error
    except (ImportError, AttributeError) as error:
        version = importlib.metadata.version("torchax")
        raise ImportError(
            f"torchax {version} cannot be imported with PyTorch {torch.__version__} ({error}): torchax "
            f"0.0.13 names operators that PyTorch 2.13 removed; {INSTALL} installs versions that work together."
        ) from error
    types = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
    types += [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
    promoted = {pair: torch.promote_types(*pair) for pair in itertools.product(types, types)}
    # torchax 0.0.13 has no lowering for this function of two types, which azula's layers call.
    environment.override_op_definition(torch.promote_types, lambda first, second: promoted[first, second])
    environment.get_and_rotate_prng_key = _refuse_random_numbers
    return Torch(torch, environment, tensor.OperatorNotFound)


@contextlib.contextmanager
def _settings_kept(torch: Any) -> Iterator[None]:
    """Context after which the settings that an import of torchax changes are as before."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    telemetry = "ENABLE_RUNTIME_UPTIME_TELEMETRY"
    had = os.environ.get(telemetry)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        if had is None:
            os.environ.pop(telemetry, None)


@contextlib.contextmanager
def _as_jax(torch: Any, environment: Any) -> Iterator[None]:
    """Context in which operations of PyTorch run in JAX and make their tensors there; PyTorch compiles nothing."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its operator reads the memory of tensors
    try:
        with (
            warnings.catch_warnings(),
            jax.numpy_rank_promotion("allow"),
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
            environment,
            torch.device("jax"),
        ):
            # Modules ask for 64 bits where PyTorch counts in them; JAX has 32 unless told otherwise.
            warnings.filterwarnings("ignore", message="Explicitly requested dtype")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _refuse_random_numbers(generator: Any = None) -> NoReturn:
    """Replacement of torchax's random numbers, which would be the same in every call of a compiled program.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "the PyTorch module draws random numbers, which a compiled program would repeat in every call; give the noise "
        "as an input of the module, and switch dropout off."
    )


def _tensors(torch: Any, module: Any) -> dict[str, Any]:
    """Parameters, buffers and tensors that are plain attributes of a module or its parts, by name."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                found[f"{path}.{name}" if path else name] = value
    return found


def _array(tensor: Any) -> Array:
    """Copy of a tensor as an array of JAX."""
    # A copy: JAX may take an array of NumPy as it is, which here is the memory of the tensor.
    return jnp.array(np.array(import_torch().environment.t2j_copy(tensor.detach())))


def _skeleton(torch: Any, module: Any, tensors: dict[str, Any]) -> Any:
    """Copy of a module whose tensors have shapes and no values, so that it takes no memory."""
    empty = {}
    for tensor in tensors.values():
        shape_only = torch.empty_like(tensor.detach(), device="meta")
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        empty[id(tensor)] = torch.nn.Parameter(shape_only, requires_grad=False) if is_parameter else shape_only
    return copy.deepcopy(module, empty)


def _called(torch: Any, module: Any, call: Callable[..., Any] | None) -> Any:
    """Module whose forward method calls a function with a module, because PyTorch replaces tensors of modules only."""

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Any) -> Any:
            return self.module(*inputs) if call is None else call(self.module, *inputs)

    return Called()


def _signature(fn: Callable[..., Any]) -> inspect.Signature | None:
    """Signature of a function, or None for one that has none."""
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        return None
