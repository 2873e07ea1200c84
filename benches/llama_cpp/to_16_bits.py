"""A GGUF file in 16 bits from a quantised one: the weights that `segattn convert --dtype bf16` makes of it.

    pip install gguf && python to_16_bits.py IN.gguf OUT.gguf
"""

import sys

import gguf
import numpy as np

source, target = sys.argv[1:]
reader = gguf.GGUFReader(source)
writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
SKIPPED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
for field in reader.fields.values():
    if not field.name.startswith(SKIPPED):
        kind, inner = field.types[0], field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
for tensor in reader.tensors:
    wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    # To the nearest bf16, ties to even.
    bits = wide.view(np.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    if wide.ndim == 1:
        writer.add_tensor(tensor.name, (bits << 16).astype(np.uint32).view(np.float32))
    else:
        data = bits.astype(np.uint16).view(np.uint8)
        writer.add_tensor(tensor.name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
