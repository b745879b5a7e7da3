"""What is wrong with a compiled kernel, by its row (see :mod:`tests.compile.worker`).

Every kernel stays within the device's shared memory and spills no register, or hardly one, and a driver refuses none of
its launches (:mod:`tests.compile.driver`). One that multiplies matrices uses the tensor cores, and its main loop

- fetches in advance: it copies asynchronously, and the copies of the first ``num_stages − 1`` steps stand before it;
- on Hopper, multiplies out of shared memory and waits once a step: no wgmma takes an operand from registers, nothing is
  read from shared memory on the way, and ptxas has nothing to say about wgmma that it takes one by one;
- is short.

Kernels that read through descriptors (the copy engine, TMA) are held to all of it. Those that gather through pointers
are for what descriptors cannot describe: they copy asynchronously where channels lie in runs of 16 bytes.

Of operands in 8 bits both, the loop converts none on the way to the tensor cores.

Three exceptions. Products of float32 in full are three products of halves, which pass through registers. On sm_100,
which keeps its sums in a memory of their own and gets Hopper's tiles, what spills outside of the main loop is let be.
With Triton 3.9, and on sm_120, a few such instructions are: see :data:`FEW_SPILLS`.
"""

from __future__ import annotations

#: Instructions of a step on Hopper, operands of 16 bits: what the shipped configurations have, and a margin.
BUDGETS = {
    "conv2d_box_kernel": 130,
    # Three taps a turn.
    "conv2d_batch_box_weight_grad_kernel": 180,
    "conv2d_gemm_kernel": 100,
    "conv2d_warp_specialized_kernel": 65,
}
#: More of them with Triton 3.9, where a step has eight wgmma or more: two barriers and six constants were not there
#: with 3.7. Of a tile of 128 × 256 such a step takes the tensor cores 128 · 256 · 64 / 2,048 = 1,024 clocks, and 103
#: instructions of 8 warps take each of 4 schedulers 206: what is added hides behind the products.
MORE_WITH_3_9 = {"conv2d_gemm_kernel": 3}
#: Of the instructions of a kernel, and of its loop if that has no products. ptxas of CUDA 13.4 (Triton 3.9), and on
#: sm_120 that of Triton 3.7 too, aims at so few registers that it spills 2 to 22 instructions of 400 to 6,000. Outside
#: of loops they run once a tile; loops without products (4 of 262 in depthwise kernels with offsets of 64 bits, 3 of
#: 270 in sums over pixels) wait for memory, and tiles that fit would take a quarter more instructions an output.
FEW_SPILLS = 0.02
#: Everywhere, of a kernel without products and outside of its inner loops. ptxas aims at 96, 128 or 168 registers, for
#: another block a multiprocessor, and keeps on the stack what a program needs again when it merges its sums: 2 to 6 of
#: 1,300 to 2,100 instructions in depthwise kernels, once a program or a row of pixels.
RARE_SPILLS = 0.004
#: On sm_80, of a kernel with products and outside of its loops. ptxas holds a tile of 128 × 32 to 128 registers, for
#: four blocks a multiprocessor, and one of 64 × 64 to 168, for three; the end of both makes the sums of a batch norm's
#: gradient: 2 of 2,640 instructions and 4 of 3,216, once a tile.
SPILLS_A_TILE = 0.002
#: In a loop without products, of an iteration: a row of pixels in depthwise kernels of a few channels in NCHW whose
#: statistics end in their launch (4 of 187 instructions, loads and stores of images among them, on sm_80).
SPILLS_A_ROW = 4
IN_8_BITS = {"int8", "float8_e4m3fn"}
#: Products of such, by mma.sync and by wgmma, and what would turn their operands into others.
NARROW = ("IMMA", "QMMA", "IGMMA", "QGMMA", "UTCIMMA", "UTCQMMA")
WGMMA = ("HGMMA", "IGMMA", "QGMMA")
CONVERSIONS = ("I2F", "I2FP", "F2I", "F2F", "F2FP")
#: Of kernels that are not listed.
BUDGET = 150
#: Operands of four bytes that lie across the sum are transposed on the way.
MORE_FOR_TF32 = 25
#: With three products for each.
BUDGET_OF_HALVES = 550


def faults(row: dict) -> list[str]:
    """One line each; empty for a good kernel."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = []
    # A few bytes of stack that nothing touches cost nothing.
    if row["stack"] and row.get("spills", 1) and not _spills_little(row):
        found.append(f"spills: {row.get('spills', 'some')} instructions, {row['stack']} bytes of stack")
    if row["shared_memory"] > row["limit"]:
        found.append(f"{row['shared_memory']} bytes of shared memory, the device has {row['limit']}")
    if multiplies_matrices(row):
        found += _of_products(row)
    return found + row.get("refused", [])


def multiplies_matrices(row: dict) -> bool:
    """Whether the kernel is a matrix product for tensor cores: fp32 in full precision has none."""
    options = row["options"]
    product = row["descriptors"] or "PRECISION" in options
    return product and options.get("VARIANT") != "direct" and not (_is_fp32(row) and options["PRECISION"] == "ieee")


def _of_products(row: dict) -> list[str]:
    if not row["tensor_core"]:
        return ["no tensor-core instruction"]
    found = []
    for loop in row["loops"]:
        found += _of_loop(row, loop)
    if set(row["dtypes"][:2]) <= IN_8_BITS:
        found += _of_bytes(row)
    if row["kernel"] == "conv2d_block_diagonal_kernel" and not row["instructions"].get("LDGSTS"):
        # Its loop over few taps may be unrolled; the other, for a tile that met a NaN, is left to wait.
        found.append("no asynchronous copies")
    if row["descriptors"] and not row["instructions"].get("UTMALDG"):
        found.append("no copy by the copy engine")
    if row["descriptors"]:
        found += row["warnings"]
    return list(dict.fromkeys(found))


def _of_bytes(row: dict) -> list[str]:
    """Faults of products whose operands both have 8 bits."""
    found = [] if row["tensor_core"] in NARROW else [f"{row['tensor_core']} for operands of 8 bits"]
    for loop in row["loops"]:
        found += [f"{name} in the main loop" for name in CONVERSIONS if loop["instructions"].get(name)]
    return found


def _of_loop(row: dict, loop: dict) -> list[str]:
    found, instructions = [], loop["instructions"]
    ahead = (int(row["options"].get("num_stages", 1)) - 1) * loop["copies"]
    if copies_asynchronously(row) and not loop["copies"]:
        found.append("main loop without asynchronous copies")
    if copies_asynchronously(row) and loop["copies_ahead"] < ahead:
        found.append(f"{loop['copies_ahead']} copies before the main loop, {ahead} expected")
    if row["descriptors"] and row["tensor_core"] in WGMMA:
        halves = row["options"].get("PRECISION") == "tf32x3"
        budget = BUDGETS.get(row["kernel"], BUDGET) + MORE_FOR_TF32 * _is_fp32(row)
        if _triton(row) >= (3, 9) and instructions.get(row["tensor_core"], 0) >= 8:
            budget += MORE_WITH_3_9.get(row["kernel"], 0)
        for name, count, allowed in (
            ("wgmma with an operand from registers", 0 if halves else loop["register_operands"], 0),
            ("waits for wgmma", loop["waits"], 3 if halves else 1),
            ("LDSM", 0 if halves else instructions.get("LDSM", 0), 0),
            ("synchronous LDG", instructions.get("LDG", 0), 0),
            ("instructions", loop["length"], BUDGET_OF_HALVES if halves else budget),
        ):
            if count > allowed:
                found.append(f"{count} {name} in the main loop, {allowed} allowed")
    return found


def _spills_little(row: dict) -> bool:
    """Whether a kernel spills only where that is let be, and no more than that."""
    if "spills" not in row:
        return False
    newer = row["capability"][0] >= 12 or _triton(row) >= (3, 9)
    for loop in row.get("loops", ()):
        inside = sum(loop["instructions"].get(name, 0) for name in ("LDL", "STL"))
        of_rows = SPILLS_A_ROW if row["capability"][0] == 8 else 0
        let_be = 0 if row["tensor_core"] else FEW_SPILLS * loop["length"] if newer else of_rows
        if inside > let_be:
            return False
    of_products = SPILLS_A_TILE if row["capability"][0] == 8 else 0
    share = FEW_SPILLS if newer else of_products if row["tensor_core"] else RARE_SPILLS
    few = row["spills"] <= share * sum(row.get("instructions", {}).values())
    return few or row["capability"][0] == 10


def _triton(row: dict) -> tuple[int, int]:
    major, minor, *_ = row["triton"].split(".")
    return int(major), int(minor)


def copies_asynchronously(row: dict) -> bool:
    """Whether the multiplying loop itself should copy its next operands: with cp.async, those in runs of 16 bytes."""
    options = row["options"]
    if row["descriptors"]:
        return "BUFFERS" not in options  # of warp-specialised kernels another warp does
    if row["kernel"] == "strided_product_kernel":
        runs = ("A_ALIGN_M", "A_ALIGN_K"), ("B_ALIGN_K", "B_ALIGN_N")
        return all(max(int(options[name]) for name in names) >= 8 for names in runs)
    alignments = [int(options[name]) for name in ("SOURCE_ALIGN", "FILTER_ALIGN", "GRAD_ALIGN") if name in options]
    return options.get("VARIANT") == "taps" and bool(alignments) and min(alignments) >= 8


def _is_fp32(row: dict) -> bool:
    """Of the operands: sums over pixels and parts of sums are always fp32."""
    return row["dtypes"][0] == "float32"
