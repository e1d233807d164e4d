"""tpu/babysit.sh: the run goes on through preemptions, crashes and quotas, or it gives up and says why."""

from support.cloud import RUN, Cloud


def running(step: int, status: str = "running", reason: str = "") -> dict[str, object]:
    return {"status": status, "step": step, "reason": reason}


def test_babysit_through_a_preemption(cloud: Cloud) -> None:
    cloud.world(
        queued="ACTIVE",
        state=running(10),
        events=[
            ["storage cat", 2, {"state": running(20)}],
            ["storage cat", 3, {"state": running(25, "preempted", "SIGTERM"), "queued": "SUSPENDED"}],
            ["worker.sh start", 1, {"state": running(25)}],
            ["storage cat", 6, {"state": running(40, "done")}],
        ],
    )
    done = cloud.run("babysit")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the TPU is SUSPENDED; recovery 1" in done.stdout and "done at step 40" in done.stdout
    way = ["queued-resources delete", "queued-resources create", "tpu-vm scp", "worker.sh install", "worker.sh start"]
    assert cloud.order(*way) == way
    assert cloud.asked(f"run.dir={RUN} ") == 1  # the same run
    assert "still billed" in done.stdout


def test_babysit_when_the_vm_is_preempted_before_its_queued_resource(cloud: Cloud) -> None:
    cloud.world(
        queued="ACTIVE",
        node="PREEMPTED",
        state=running(10),
        events=[["storage cat", 3, {"state": running(20, "done")}]],
    )
    assert cloud.run("babysit", "--delete-when-done").returncode == 0
    create, delete = "queued-resources create", "queued-resources delete"
    assert cloud.order(create, delete) == [delete, create, delete]


def test_babysit_from_nothing(cloud: Cloud) -> None:
    cloud.world(
        events=[["worker.sh start", 1, {"state": running(0)}], ["storage cat", 4, {"state": running(5, "done")}]]
    )
    done = cloud.run("babysit")
    assert done.returncode == 0 and cloud.asked("queued-resources create") == 1, done.stderr


def test_babysit_after_a_crash_keeps_the_tpu(cloud: Cloud) -> None:
    cloud.world(
        queued="ACTIVE", alive=False, state=running(10), events=[["storage cat", 9, {"state": running(20, "done")}]]
    )
    done = cloud.run("babysit")
    assert done.returncode == 0 and "psyche does not run on every worker" in done.stdout
    assert cloud.asked("queued-resources delete") == cloud.asked("queued-resources create") == 0
    assert cloud.order("worker.sh stop", "worker.sh start") == ["worker.sh stop", "worker.sh start"]


def test_babysit_leaves_a_slow_run_alone(cloud: Cloud) -> None:
    cloud.world(queued="ACTIVE", state=running(10), events=[["storage cat", 14, {"state": running(11, "done")}]])
    assert cloud.run("babysit").returncode == 0
    assert cloud.asked("worker.sh alive") == 2 and cloud.asked("worker.sh start") == 0


def test_babysit_stops_on_failed(cloud: Cloud) -> None:
    cloud.world(queued="ACTIVE", state=running(30, "failed", "loss is NaN"))
    done = cloud.run("babysit")
    assert done.returncode == 1 and "failed at step 30: loss is NaN" in done.stderr
    assert cloud.asked("create") == cloud.asked("ssh") == 0


def test_babysit_gives_up_without_progress(cloud: Cloud) -> None:
    cloud.settings(MAX_FAILURES="2")
    preempt = [["worker.sh alive", n, {"queued": "SUSPENDED"}] for n in range(1, 4)]
    cloud.world(queued="SUSPENDED", state=running(10, "preempted"), events=preempt)
    done = cloud.run("babysit")
    assert done.returncode == 1
    assert "gave up: 2 recoveries in a row without a step after 10" in done.stderr
    assert cloud.asked("worker.sh start") == 2


def test_babysit_counts_anew_after_progress(cloud: Cloud) -> None:
    cloud.settings(MAX_FAILURES="2")
    events: list[list[object]] = []
    for n in range(1, 3):  # each recovery brings some steps before the next preemption
        events.append(["worker.sh alive", n, {"queued": "SUSPENDED", "state": running(10 * n, "preempted")}])
    events.append(["worker.sh alive", 3, {"state": running(99, "done")}])
    cloud.world(queued="SUSPENDED", state=running(0, "preempted"), events=events)
    done = cloud.run("babysit")
    assert done.returncode == 0 and done.stdout.count("recovery 1 of at most 2") == 3, done.stderr


def test_babysit_gives_up_on_quota(cloud: Cloud) -> None:
    cloud.settings(MAX_FAILURES="2")
    error = "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUs' has been exceeded"
    cloud.world(rules=[["queued-resources create", {"err": error, "rc": 1}]])
    done = cloud.run("babysit")
    assert done.returncode == 1 and "gave up: 2" in done.stderr and "out of quota" in done.stderr
    assert cloud.asked("queued-resources create") == 2


def test_babysit_survives_a_while_without_network(cloud: Cloud) -> None:
    error = {"err": "ERROR: (gcloud) Could not reach the network", "rc": 1}
    cloud.world(queued="ACTIVE", state=running(5, "done"), rules=[["queued-resources describe", {**error, "times": 3}]])
    assert cloud.run("babysit").returncode == 0
    cloud.world(queued="ACTIVE", rules=[["state.json", error]])
    done = cloud.run("babysit")
    assert done.returncode == 1 and "gave up: no answer" in done.stderr and "Could not reach" in done.stderr
