"""tpu/create.sh: a queued resource, until it is there or will not be."""

import pytest
from support.cloud import Cloud, one_line_error


def test_create(cloud: Cloud) -> None:
    cloud.world(next=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    done = cloud.run("create")
    assert done.returncode == 0, done.stderr
    assert [w for w in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE") if f"psyche-test: {w}" in done.stdout] != []
    call = next(call for call in cloud.calls() if "queued-resources create" in call)
    for flag in (
        "--node-id=psyche-test",
        "--spot",
        "--accelerator-type=v5litepod-16",
        "--project=my-project",
        "--quiet",
    ):
        assert flag in call
    assert cloud.asked("delete") == 0


@pytest.mark.parametrize(("capacity", "flag"), [("on-demand", None), ("reserved", "--reserved")])
def test_create_by_capacity(capacity: str, flag: str | None, cloud: Cloud) -> None:
    cloud.settings(CAPACITY=capacity)
    assert cloud.run("create").returncode == 0
    call = next(call for call in cloud.calls() if "queued-resources create" in call)
    assert "--spot" not in call and (flag is None or flag in call)


def test_create_goes_on_waiting_and_is_content_with_active(cloud: Cloud) -> None:
    cloud.world(queued="WAITING_FOR_RESOURCES", next=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    assert cloud.run("create").returncode == 0 and cloud.asked("queued-resources create") == 0
    assert "already" in cloud.run("create").stdout


@pytest.mark.parametrize("late", [False, True])
def test_create_out_of_quota(late: bool, cloud: Cloud) -> None:
    text = "Quota limit 'TPUV5sPreemptiblePerProjectPerRegionForTPUAPI' has been exceeded. Limit: 0 in region us-west4."
    if late:  # accepted first, then FAILED
        cloud.world(next=["WAITING_FOR_RESOURCES", "FAILED"], failure=text)
    else:
        cloud.world(
            rules=[["queued-resources create", {"err": f"ERROR: (gcloud) RESOURCE_EXHAUSTED: {text}", "rc": 1}]]
        )
    one_line_error(cloud.run("create"), 1, "out of quota", "Limit: 0", "queued-resources list")
    assert cloud.asked("queued-resources create") == 1  # asking again would not help


def test_create_preempted_while_creating(cloud: Cloud) -> None:
    cloud.world(next=["PROVISIONING", "SUSPENDING", "SUSPENDED", "ACTIVE"])
    done = cloud.run("create")
    assert done.returncode == 0, done.stderr
    assert "preempted while it was being created" in done.stdout
    create, delete = "queued-resources create", "queued-resources delete"
    assert cloud.order(create, delete) == [create, delete, create]


def test_create_no_capacity_then_capacity(cloud: Cloud) -> None:
    error = 'ERROR: (gcloud) RESOURCE_EXHAUSTED: There is no more capacity in the zone "us-west4-a"'
    cloud.world(rules=[["queued-resources create", {"err": error, "rc": 1, "times": 2}]])
    done = cloud.run("create")
    assert done.returncode == 0 and done.stdout.count("no capacity") == 2


def test_create_gives_up(cloud: Cloud) -> None:
    cloud.world(next=["FAILED"] * 50, failure="an internal error")
    one_line_error(cloud.run("create"), 1, "no TPU after 5 attempts", "an internal error")
    assert cloud.asked("queued-resources create") == 5


def test_create_without_an_answer_ends(cloud: Cloud) -> None:
    expired = {"err": "ERROR: (gcloud) There was a problem refreshing your current auth tokens", "rc": 1}
    cloud.world(
        next=["WAITING_FOR_RESOURCES"], events=[["queued-resources create", 1, {"rules": [["describe", expired]]}]]
    )
    one_line_error(cloud.run("create"), 1, "no answer about psyche-test", "refreshing your current auth tokens")


def test_create_not_allowed(cloud: Cloud) -> None:
    error = "ERROR: (gcloud.compute.tpus.queued-resources.create) PERMISSION_DENIED: tpu.nodes.create"
    cloud.world(rules=[["queued-resources create", {"err": error, "rc": 1}]])
    one_line_error(cloud.run("create"), 1, "PERMISSION_DENIED")
