"""README's "From laptop to pod": below each command stands what its dry run prints.

`UPDATE_README=1 pytest tests/test_launch_readme.py` writes it anew.
"""

import os
import re
import subprocess
import sys

from cloud import ROOT

README = ROOT / "README.md"
BLOCK = re.compile(r"(?<=^```console\n)(.*?)(?=^```$)", re.MULTILINE | re.DOTALL)


def dry_run(command):
    """What a command prints with --dry-run, without what changes with the code and the machine."""
    script, _, rest = command.partition(" ")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CIR_", "XLA_FLAGS"))}
    env |= {"CIR_OWNER": "you", "CIR_NOW": "1800000000", "CIR_LAUNCH_PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "-c", f"{script} --dry-run {rest}"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.replace(str(ROOT), "/checkout")
    text = re.sub(r"\b[0-9a-f]{64}\b", "SHA256", text)
    text = re.sub(r"(?<=code/)[0-9a-f]{12}\b|(?<=cir-)[0-9a-f]{12}\b", "SHA", text)
    text = re.sub(r"(?<=--sha=)[0-9a-f]{12}|(?<=\$h\" )[0-9a-f]{12}", "SHA", text)
    return re.sub(r"\S*/cir-SHA.tar.gz (?=\w)", "/tmp/cir-SHA.tar.gz ", text)


def test_dry_runs_are_those_of_the_readme():
    readme = README.read_text()
    begin = readme.index("## From laptop to pod\n")
    section = readme[begin : readme.index("\n## ", begin)]

    def fresh(match):
        commands = [line for line in match[0].splitlines() if line.startswith("$ tpu_scripts/")]
        return "".join(f"{command}\n{dry_run(command[2:])}" for command in commands)

    updated = BLOCK.sub(fresh, section)
    assert updated.count("\n$ tpu_scripts/") == 8
    if os.environ.get("UPDATE_README"):
        README.write_text(readme.replace(section, updated))
    assert README.read_text()[begin:].startswith(updated)
