"""What the assembler makes of every kernel instance, held against limits: spills, registers, number and size.

    python tests/cuda/resources.py [--arch 90a 80] [--jobs 2]

Compiles the kernels of each line of cuda/src/instances.h with nvcc and reads ptxas' report. A kernel that spills more,
or more kernels or bytes of code than expected, is an error: new instances are meant to raise the limits knowingly.
Needs nvcc, no GPU.
"""

import argparse
import concurrent.futures
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

CUDA = pathlib.Path(__file__).parents[2] / "cuda"
SPILL_BYTES = 48  # of stores, per kernel: a dozen words
RAGGED_SPILL_BYTES = 136  # the instances for slices that are not full
RAGGED = re.compile(r"GemvConfig.*Li[12]ELNS0_4LoopE0E|(GemmConfig|TrellisConfig).*Lb0E")
KERNELS = 748
OBJECT_MB = 34.5  # of all instances, one architecture

INSTANCE = re.compile(r"X\(([a-z]+[0-9]+), ([A-Za-z]+(?:<[0-9]+>)?),")
REPORT = re.compile(
    r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r"ptxas info\s+: Used (\d+) registers"
)


def compile_instance(name: str, decoder: str, arch: str, folder: pathlib.Path) -> tuple[str, int]:
    """ptxas' report and the size of the object."""
    out = folder / f"{name}.o"
    includes = [f"-I{path}" for path in (CUDA / "include", CUDA.parent / "cpp/include", CUDA / "src")]
    defines = [f"-DHIGGS_DECODER_NAME={name}", f"-DHIGGS_DECODER={decoder}"]
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    options = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v"]
    source = CUDA / "src/decoder_instance.cu"
    command = ["nvcc", target, *options, *includes, *defines, "-c", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{name}: {done.stderr}")
    return done.stderr, out.stat().st_size


def check_arch(arch: str, jobs: int) -> list[str]:
    """What is wrong with the kernels of an architecture."""
    instances = INSTANCE.findall((CUDA / "src/instances.h").read_text())
    problems, kernels, size = [], 0, 0
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        pending = [pool.submit(compile_instance, *i, arch, pathlib.Path(folder)) for i in instances]
        for (name, _), job in zip(instances, pending, strict=True):
            report, nbytes = job.result()
            found = REPORT.findall(report)
            kernels, size = kernels + len(found), size + nbytes
            most = max(int(f[4]) for f in found)
            spilled = [(f[0], int(f[2])) for f in found if int(f[2]) > 0]
            print(
                f"sm_{arch} {name:8} {len(found):3} kernels, at most {most} registers, {len(spilled)} spill, "
                f"{nbytes >> 10} KB"
            )
            for kernel, spill in spilled:
                limit = RAGGED_SPILL_BYTES if RAGGED.search(kernel) else SPILL_BYTES
                if spill > limit:
                    problems.append(f"sm_{arch}: {kernel} spills {spill} bytes, at most {limit}")
    print(f"sm_{arch}: {kernels} kernels, {size / 2**20:.1f} MB")
    if kernels != KERNELS:
        problems.append(f"sm_{arch}: {kernels} kernels, expected {KERNELS}")
    if size > OBJECT_MB * 2**20:
        problems.append(f"sm_{arch}: {size / 2**20:.1f} MB of objects, at most {OBJECT_MB}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["90a", "80"])
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("no nvcc: kernel resources not checked")
        return
    problems = [problem for arch in args.arch for problem in check_arch(arch, args.jobs)]
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
