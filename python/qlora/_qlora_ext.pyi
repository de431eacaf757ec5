from typing import Any, Protocol, TypedDict

# Any array library's array (numpy, cupy, jax, torch): contiguous, on CPU or CUDA. On CUDA every output must be given as
# `out=`, and `stream` is the integer of a cudaStream_t (None: the legacy default stream).
class SupportsDLPack(Protocol):
    def __dlpack__(self, *, stream: Any = ...) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, int]: ...

class HostArray:
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def __dlpack__(
        self,
        *,
        stream: None = ...,
        max_version: tuple[int, int] | None = ...,
        dl_device: tuple[int, int] | None = ...,
        copy: bool | None = ...,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class BuildInfo(TypedDict):
    version: str
    cuda_architectures: list[str]
    cuda_toolkit: str
    cxx_compiler: str
    torch_headers: str
    cpu_kernels: str

class Device(TypedDict):
    name: str
    compute_capability: tuple[int, int]
    num_multiprocessors: int
    l2_bytes: int
    total_bytes: int
    has_kernels: bool

def build_info() -> BuildInfo: ...
def devices() -> list[Device]: ...
def explain_linear_4bit(
    m: int, shape: tuple[int, int], dtype: str = ..., *, is_grad: bool = ..., device: int = ...
) -> str: ...
def nested_code() -> HostArray: ...
def quantize_4bit(
    input: SupportsDLPack,
    block_size: int = ...,
    quant_type: str = ...,
    *,
    out: tuple[SupportsDLPack, SupportsDLPack] | None = ...,
    stream: int | None = ...,
    num_threads: int = ...,
) -> tuple[Any, Any]: ...
def dequantize_4bit(
    packed: SupportsDLPack,
    absmax: SupportsDLPack,
    shape: tuple[int, int],
    dtype: str = ...,
    block_size: int = ...,
    quant_type: str = ...,
    *,
    nested_absmax: SupportsDLPack | None = ...,
    nested_quant_map: SupportsDLPack | None = ...,
    nested_offset: SupportsDLPack | None = ...,
    out: SupportsDLPack | None = ...,
    stream: int | None = ...,
    num_threads: int = ...,
) -> Any: ...
def quantize_absmax(
    absmax: SupportsDLPack,
    nested_offset: SupportsDLPack,
    nested_quant_map: SupportsDLPack,
    *,
    out: tuple[SupportsDLPack, SupportsDLPack] | None = ...,
    stream: int | None = ...,
    num_threads: int = ...,
) -> tuple[Any, Any]: ...
def dequantize_absmax(
    absmax: SupportsDLPack,
    nested_absmax: SupportsDLPack,
    nested_quant_map: SupportsDLPack,
    nested_offset: SupportsDLPack,
    *,
    out: SupportsDLPack | None = ...,
    stream: int | None = ...,
    num_threads: int = ...,
) -> Any: ...
def linear_4bit(
    input: SupportsDLPack,
    packed: SupportsDLPack,
    absmax: SupportsDLPack,
    shape: tuple[int, int],
    block_size: int = ...,
    quant_type: str = ...,
    *,
    nested_absmax: SupportsDLPack | None = ...,
    nested_quant_map: SupportsDLPack | None = ...,
    nested_offset: SupportsDLPack | None = ...,
    bias: SupportsDLPack | None = ...,
    out: SupportsDLPack | None = ...,
    workspace: SupportsDLPack | None = ...,
    stream: int | None = ...,
    num_threads: int = ...,
) -> Any: ...
def linear_4bit_grad_input(
    grad_output: SupportsDLPack,
    packed: SupportsDLPack,
    absmax: SupportsDLPack,
    shape: tuple[int, int],
    block_size: int = ...,
    quant_type: str = ...,
    *,
    nested_absmax: SupportsDLPack | None = ...,
    nested_quant_map: SupportsDLPack | None = ...,
    nested_offset: SupportsDLPack | None = ...,
    out: SupportsDLPack | None = ...,
    workspace: SupportsDLPack | None = ...,
    stream: int | None = ...,
    num_threads: int = ...,
) -> Any: ...
def linear_4bit_workspace_size(
    m: int,
    shape: tuple[int, int],
    dtype: str,
    block_size: int = ...,
    quant_type: str = ...,
    *,
    is_nested: bool = ...,
    is_grad: bool = ...,
    has_bias: bool = ...,
    device: int = ...,
) -> int: ...
def embedding_4bit(
    indices: SupportsDLPack,
    packed: SupportsDLPack,
    absmax: SupportsDLPack,
    shape: tuple[int, int],
    dtype: str = ...,
    block_size: int = ...,
    quant_type: str = ...,
    *,
    nested_absmax: SupportsDLPack | None = ...,
    nested_quant_map: SupportsDLPack | None = ...,
    nested_offset: SupportsDLPack | None = ...,
    out: SupportsDLPack | None = ...,
    stream: int | None = ...,
    num_threads: int = ...,
) -> Any: ...
