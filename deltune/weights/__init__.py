"""Stored weights: files of tensors, quantised tensors, and arithmetic on a weight as it lies in memory. Only this room
touches any of them, and only this room's bnb.py knows bitsandbytes."""

from deltune.weights.arithmetic import (
    add_product_to_weight,
    add_to_weight,
    float_view,
    multiplies_bfloat16,
    restore,
    row_blocks,
    row_products,
    row_squares,
    snapshot,
    store_as,
)
from deltune.weights.files import (
    PICKLE_ENDINGS,
    check_tensor,
    disk_full,
    read_tensors,
    replacing,
    says_disk_full,
    sha256_of,
    sync,
    write_tensors,
)
from deltune.weights.quantised import (
    KINDS,
    QuantisedTensor,
    dequantised,
    is_quantised,
    quantise,
    quantised_like,
    stored_bytes,
)

__all__ = [
    "KINDS",
    "PICKLE_ENDINGS",
    "QuantisedTensor",
    "add_product_to_weight",
    "add_to_weight",
    "check_tensor",
    "dequantised",
    "disk_full",
    "float_view",
    "is_quantised",
    "multiplies_bfloat16",
    "quantise",
    "quantised_like",
    "read_tensors",
    "replacing",
    "restore",
    "row_blocks",
    "row_products",
    "row_squares",
    "says_disk_full",
    "sha256_of",
    "snapshot",
    "store_as",
    "stored_bytes",
    "sync",
    "write_tensors",
]
