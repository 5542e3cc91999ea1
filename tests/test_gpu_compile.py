"""The Triton kernels compiled for GPUs that need not be here: down to the machine code, by Triton's own assembler.

In a process of its own, since the other tests run the same kernels in Triton's interpreter.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")
pytestmark = pytest.mark.slow

# Strides of 1 and multiples of 16 are compiled in, as Triton's launcher does with a layer's sizes.
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lowrank.kernels.gpu import gradients, product

def compiled(kernel, pointers, constants, options):
    names = kernel.arg_names
    types = {n: pointers.get(n, "i32") for n in names if n not in constants}
    sixteens = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in types and n != "tokens"}
    source = ASTSource(kernel, {**types, **{n: "constexpr" for n in constants}}, constants, attrs=sixteens)
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    return {"shared": made.metadata.shared, "wgmma": "wgmma" in made.asm["ptx"], "code": len(made.asm["cubin"])}

dtype, found = sys.argv[2], {}
for tile in product.TILES:
    for form in ("forward", "backward"):
        onto, columns = form == "backward", ("m_row", "n_row") if form == "forward" else ("m_col", "n_col")
        constants = dict.fromkeys(("x_col", "s_col", "out_col", *columns), 1) | dict(
            HAS_BIAS=not onto, ONTO=onto, BLOCK_T=tile.tokens, BLOCK_OUT=tile.width, BLOCK_IN=tile.inner,
            BLOCK_R=16, GROUP=product.GROUP,
        )
        pointers = dict.fromkeys(("x", "m", "s", "n", "bias", "out"), dtype)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        found[f"{form} {tuple(tile)}"] = compiled(product._product_kernel, pointers, constants, options)
pointers = dict.fromkeys(("dy", "s", "b", "ds"), dtype) | {"partial": "*fp32"}
constants = dict.fromkeys(("dy_col", "s_col", "b_col"), 1) | dict(
    BLOCK_T=gradients.BLOCK_T, BLOCK_D=gradients.BLOCK_D, BLOCK_R=16
)
found["gradients"] = compiled(gradients._gradients_kernel, pointers, constants, {})
print(json.dumps(found))
"""
# bytes of shared memory a program can have (CUDA C++ Programming Guide, technical specifications per capability)
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}


@pytest.mark.parametrize("dtype", ["*bf16", "*fp16", "*fp32"])
@pytest.mark.parametrize("capability", SHARED, ids={80: "A100", 86: "RTX 3090", 90: "H100"}.get)
def test_the_kernels_compile(capability, dtype, tmp_path):
    """All of them; and on every GPU some tile of the product has the memory it needs, and the gradients have."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability), dtype],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(one["code"] > 1000 for one in found.values())
    fits = {name for name, one in found.items() if one["shared"] <= SHARED[capability]}
    assert {"gradients", "forward (64, 64, 32, 4, 2)", "backward (64, 64, 32, 4, 2)"} <= fits
    if capability == 90 and dtype != "*fp32":  # the tensor cores, at the largest tile
        assert all(one["wgmma"] for name, one in found.items() if name != "gradients")
        assert fits == set(found)
