"""A stand-in for gcloud: logs its arguments as JSON lines, and answers from a small model of the world.

FAKE_GCLOUD names a folder with `world` (what exists, see DEFAULT; a Python literal) and `calls.jsonl` (what was asked).

- `rules`: [[text, {"out", "err", "rc", "times"}], ...]: the first rule whose text is in the command answers it,
  `times` times (always, if not given).
- `events`: [[text, n, changes], ...]: at the n-th command that contains the text, the world changes first.
- `execute`: ssh runs the command here, in a home folder for each worker, and the bucket is a folder.
"""

# The tests make a great many calls: json and pathlib would each double the time that one takes.
# ruff: noqa: PTH103, PTH110, PTH118, PTH119, PTH120, PTH123
import fcntl
import os
import sys
from _json import encode_basestring_ascii as json_string

DEFAULT = {
    "queued": "NONE", "next": [], "failure": "", "node": "READY", "workers": 4, "unreachable": [], "alive": True,
    "state": None, "rules": [], "events": [], "counts": {}, "execute": False,
}  # fmt: skip
FOLDER = os.environ["FAKE_GCLOUD"]
PREFIX = "ERROR: (gcloud.compute.tpus) "


def answer(world, argv, line):
    """Returns (output, error, exit code), and changes the world."""
    for text, n, changes in world["events"]:
        if text in line:
            key = f"event {text} {n}"
            world["counts"][key] = world["counts"].get(key, 0) + 1
            if world["counts"][key] == n:
                world.update(changes)
    for text, reply in world["rules"]:
        if text in line and reply.get("times", 1) > 0:
            if "times" in reply:
                reply["times"] -= 1
            return reply.get("out", ""), reply.get("err", ""), reply.get("rc", 0)
    verb = " ".join(argv[:4])
    if verb.startswith("auth list"):
        return "someone@example.com\n", "", 0
    if verb == "compute tpus queued-resources describe":
        if world["queued"] == "NONE":
            return "", PREFIX + "NOT_FOUND: Resource 'projects/..' was not found", 1
        if "failedData" in line:
            return world["failure"] + "\n", "", 0
        state = world["queued"]
        if world["next"] and state != "ACTIVE":
            world["queued"] = world["next"].pop(0)
        return state + "\n", "", 0
    if verb == "compute tpus queued-resources create":
        if world["queued"] != "NONE":
            return "", PREFIX + "ALREADY_EXISTS: Resource already exists", 1
        world["queued"] = world["next"].pop(0) if world["next"] else "ACTIVE"
        world["node"] = "READY"
        return "", "Create request issued", 0
    if verb == "compute tpus queued-resources delete":
        world["queued"] = "NONE"
        return "", "", 0
    if verb == "compute tpus tpu-vm describe":
        if "state,health" in line:
            return f"{world['node']}\tHEALTHY\t{world['workers']}\n", "", 0
        return f"{world['node'] if 'value(state)' in line else world['workers']}\n", "", 0
    if verb in ("compute tpus tpu-vm ssh", "compute tpus tpu-vm scp"):
        return on_workers(world, argv, line)
    if verb.startswith("storage cat"):
        path = bucket(argv[2])
        if world["execute"] and "*" not in path and os.path.exists(path):
            with open(path) as file:
                return file.read(), "", 0
        if world["state"] is None or "state.json" not in line:
            return "", "ERROR: (gcloud.storage.cat) The following URLs matched no objects or files:", 1
        import json

        return json.dumps(world["state"], indent=1), "", 0
    if verb.startswith("storage cp"):
        os.makedirs(os.path.dirname(bucket(argv[3])), exist_ok=True)
        import shutil  # here, since most calls do without: it starts faster

        shutil.copy(argv[2], bucket(argv[3]))
        return "", "", 0
    return "", f"fake gcloud: does not know: {line}", 97


def bucket(url):
    return os.path.join(FOLDER, "bucket", url.removeprefix("gs://"))


def on_workers(world, argv, line):
    which = next(a for a in argv if a.startswith("--worker=")).removeprefix("--worker=")
    numbers = range(world["workers"]) if which == "all" else [int(which)]
    command = next((a.removeprefix("--command=") for a in argv if a.startswith("--command=")), "")
    out, code = "", 0
    for n in numbers:
        if n in world["unreachable"]:
            code = 255
        elif "worker.sh alive" in command and not world["alive"]:
            out += f"worker {n}: does not run (exit code 137)\n"
        elif "worker.sh log" in command:
            out += f"[worker {n}] the end of the log\n"
        elif argv[3] == "ssh":
            out += f"worker {n}: ok\n"
    if world["execute"]:
        out, code = execute(argv, command, numbers)
    elif "worker.sh start" in command:
        world["alive"] = True
    error = f"{PREFIX}[/usr/bin/ssh] exited with return code [255]." if code == 255 else ""
    return out, error, code


def execute(argv, command, numbers):
    """Copies to, or runs the command in, one home folder for each worker, all at the same time."""
    import shutil
    import subprocess

    homes = [os.path.join(FOLDER, f"worker-{n}") for n in numbers]
    running, out, code = [], "", 0
    for n, home in zip(numbers, homes, strict=True):
        os.makedirs(home, exist_ok=True)
        if argv[3] == "scp":
            shutil.copytree(argv[4], os.path.join(home, os.path.basename(argv[4])), dirs_exist_ok=True)
            continue
        env = {**os.environ, "HOME": home, "FAKE_HOSTNAME": f"t1v-n-0123abcd-w-{n}"}
        running.append(
            subprocess.Popen(
                ["bash", "-c", command], cwd=home, env=env,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    for one in running:
        out += one.communicate()[0]
        code = code or one.returncode
    return out, code


def main():
    argv = sys.argv[1:]
    line = " ".join(argv)
    with open(os.path.join(FOLDER, "lock"), "w") as lock:  # the workers' log copies come at any time
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(os.path.join(FOLDER, "calls.jsonl"), "a") as log:
            log.write(f"[{', '.join(map(json_string, argv))}]\n")
        path = os.path.join(FOLDER, "world")
        with open(path) as file:
            world = {**DEFAULT, **eval(file.read())}  # the tests wrote it
        if argv[:3] == ["compute", "tpus", "tpu-vm"] and world["execute"]:
            fcntl.flock(lock, fcntl.LOCK_UN)  # what runs on a worker calls gcloud itself
        out, error, code = answer(world, argv, line)
        if not world["execute"]:
            with open(path, "w") as file:
                file.write(repr(world))
    sys.stdout.write(out)
    if error:
        sys.stderr.write(error + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
