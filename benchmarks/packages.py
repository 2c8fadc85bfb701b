"""Modules of packages from PyPI, trained by the packages' own code: are they watched and attributed as they are?

``python benchmarks/packages.py [NAME ...]`` makes an environment for each package under ``--cache`` (torch and
Lightning of ``constraints.txt``, this checkout, and the newest version of the package that pip finds beside them) and
runs ``common/package_trial.py`` in it, on ``packages/NAME.py``. A package works if

* the weights of a fit with ``StrideCallback``, ``TracInCallback`` and ``FurtherTrainingCallback`` are those of a fit
  without, to the bit;
* ``attribute()`` gives scores that are finite and not constant by ekfac, grad-dot, tracin and trak (stride may refuse,
  by name), in the process of the fit and from the checkpoint in a second one, where they are the same to 1e-4;
* scores of grad-dot are inner products of ordinary gradients of the module's ``training_step``, to 1e-3;
* a user adds at most three lines to the package's own code, the callbacks and the call of ``attribute()`` aside.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NAMES = sorted(path.stem for path in (HERE / "packages").glob("*.py"))
#: Packages whose versions every environment shares; all others are the newest that pip finds.
PINNED = ("torch", "lightning", "pytorch-lightning")
METHODS = ("ekfac", "grad-dot", "tracin", "trak", "stride")


def make_environment(folder, requirements):
    """A virtual environment with the pinned packages, this checkout and the requirements; its Python."""
    python, stamp = folder / "bin" / "python", folder / ".installed"
    made_for = f"{requirements} {sys.version}"
    if stamp.exists() and stamp.read_text() == made_for:
        return python
    pins = [line for line in (ROOT / "constraints.txt").read_text().split() if line.partition("==")[0] in PINNED]
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (folder / "pins.txt").write_text("\n".join(pins))
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch comes first and alone, so that nothing else decides which build it is.
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    for what in ([torch], ["--constraint", folder / "pins.txt", "--editable", ROOT, *requirements]):
        subprocess.run([*install, *what], check=True, stderr=subprocess.DEVNULL)
    stamp.write_text(made_for)
    return python


def requirements_of(script):
    """The line ``REQUIREMENTS = [...]`` of a package's script, which cannot be imported here."""
    line = next(line for line in script.read_text().splitlines() if line.startswith("REQUIREMENTS = "))
    return json.loads(line.partition("=")[2])


def try_package(name, cache, timeout):
    """What the trial of a package finds, as a dictionary; its output goes to a file beside the environment."""
    script, folder = HERE / "packages" / f"{name}.py", cache / name
    try:
        python = make_environment(folder, requirements_of(script))
    except subprocess.CalledProcessError as error:
        return {"problems": [f"cannot be installed: {error}"]}
    result, log = folder / "result.json", folder / "log.txt"
    result.unlink(missing_ok=True)
    # -P: the folder of the script holds files that are called like the packages.
    command = [python, "-P", HERE / "common" / "package_trial.py", script, result]
    with log.open("w") as output:
        try:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            code = f"none after {timeout} s"
    found = json.loads(result.read_text()) if result.exists() else {"problems": []}
    if code:
        found["problems"].append(f"the trial ended with code {code}: {log}")
    return found


def show(name, trial):
    """One package, in full."""
    print(f"\n{name}: {trial.get('versions', '')}")
    for key in ("loss", "added", "callbacks", "records", "grad-dot error", "methods", "second process", "seconds"):
        if key in trial:
            print(f"  {key}: {trial[key]}")
    for problem in trial["problems"]:
        print(f"  PROBLEM {problem}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=NAMES, help=f"by default all: {', '.join(NAMES)}")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "packages", help="folder of the environments")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a package, its installation aside")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"unknown packages {sorted(unknown)}; there are {', '.join(NAMES)}")
    trials = {}
    for name in args.names:
        trials[name] = try_package(name, args.cache.resolve(), args.timeout)
        show(name, trials[name])
    print(f"\n{'package':<22}{'version':<10}{'same fit':<10}", *(f"{method:<9}" for method in METHODS), end="")
    print(f"{'2nd process':<13}{'grad-dot error':<16}{'lines':<7}works")
    for name, trial in trials.items():
        methods, second = trial.get("methods", {}), trial.get("second process", {})
        print(f"{name:<22}{trial.get('version', '?'):<10}{trial.get('same fit', '?')!s:<10}", end=" ")
        print(*(f"{methods.get(method, '?').partition(':')[0]:<9}" for method in METHODS), end="")
        num_answers = sum(answer.startswith("yes") for answer in methods.values())
        again = f"{sum(answer == 'yes' for answer in second.values())} of {num_answers}"
        error = trial.get("grad-dot error", "?")
        print(f"{again:<13}{error if isinstance(error, str) else f'{error:.1e}':<16}", end="")
        print(f"{len(trial.get('added', []))!s:<7}{'NO' if trial['problems'] else 'yes'}")
    return sum(bool(trial["problems"]) for trial in trials.values())


if __name__ == "__main__":
    sys.exit(main())
