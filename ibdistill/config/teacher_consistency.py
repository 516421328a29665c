"""Settings of a teacher that contradict each other, or what is asked of it."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ibdistill.config.fields import shown
from ibdistill.config.methods import METHODS, SAMPLED

if TYPE_CHECKING:
    from ibdistill.config.sections import Config, ObjectiveConfig, TeacherConfig


def needs_answers(objective: ObjectiveConfig) -> list[str]:
    """The settings that need a teacher's answers, as a message names them; empty if none does."""
    method = METHODS[objective.method]
    asking = {
        f"objective.method {objective.method}": method.kd,
        "objective.estimator vid": method.mi and objective.estimator == "vid",
        "objective.mi_pair teacher": method.mi and objective.mi_pair == "teacher",
    }
    return [setting for setting, asks in asking.items() if asks]


def check(config: Config) -> None:
    """Raise ValueError where the settings of a teacher contradict what needs one."""
    teacher, objective = config.teacher, config.objective
    online = teacher.placement != "none"
    wanted = needs_answers(objective)
    writes = teacher.rationales != "none"
    asks = wanted + [f"teacher.rationales {teacher.rationales}"] * writes
    if asks and not online:
        raise ValueError(
            f"{' and '.join(asks)} needs an online teacher; set teacher.placement and teacher.model"
        )
    if config.data.label_source == "teacher" and not writes:
        raise ValueError("data.label_source is 'teacher'; set teacher.rationales to missing or all")
    if config.data.taught is not None and not (writes and config.data.label_source == "teacher"):
        raise ValueError(
            f"data.taught is {config.data.taught!r}: questions whose labels the teacher has to write; "
            "set teacher.rationales missing and data.label_source teacher"
        )
    if online and not asks:
        raise ValueError(
            f"teacher.placement is {teacher.placement!r}, but objective.method {objective.method} with "
            f"estimator {objective.estimator} does not use a teacher; choose kd, ib or ib+kd, "
            "let it write (teacher.rationales), or placement none"
        )
    if online and not teacher.model:
        raise ValueError(
            f"teacher.placement is {teacher.placement!r} and teacher.model is empty: which model?"
        )
    if teacher.placement == "cache":
        for needed, name in ((wanted, "cache"), (writes, "rationale_cache")):
            if needed and not getattr(teacher, name):
                raise ValueError(f"teacher.placement is 'cache'; name its folder in teacher.{name}")
    _check_server(teacher, objective, wanted)
    _check_candidates(config)
    if teacher.load_in_8bit and teacher.placement != "replica":
        raise ValueError(
            f"teacher.load_in_8bit goes with teacher.placement replica, not {teacher.placement!r}: "
            "8-bit weights are not sharded"
        )
    if objective.mi_pair == "teacher" and objective.estimator in ("infonce", "vid", "vib"):
        raise ValueError(
            f"objective.mi_pair teacher goes with estimator paper or normalized, not {objective.estimator}"
        )


def _check_server(teacher: TeacherConfig, objective: ObjectiveConfig, wanted: list[str]) -> None:
    """Raise ValueError where a teacher behind a server has no address, or is asked for what no server gives.

    `wanted`: the settings that need its answers.
    """
    if teacher.placement != "server":
        if teacher.server_urls:
            raise ValueError(
                f"teacher.server_urls goes with teacher.placement server, which is {teacher.placement!r}"
            )
        return
    if not teacher.server_urls:
        raise ValueError("teacher.placement is 'server'; name its addresses in teacher.server_urls")
    for number, url in enumerate(teacher.server_urls):
        _check_url(f"teacher.server_urls[{number}]", url)
    if teacher.rationales != "none" and not teacher.template:
        raise ValueError(
            f"teacher.rationales is {teacher.rationales!r} with teacher.placement server: set "
            "teacher.template, which says what the teacher is asked"
        )
    if not wanted:
        return
    if not teacher.cache:
        raise ValueError(
            "teacher.placement is 'server', which scores the records before training; name the folder of its "
            "answers in teacher.cache"
        )
    states = {"objective.estimator vid": "paper", "objective.mi_pair teacher": "student"}
    for setting, way_out in states.items():
        if setting in wanted:
            raise ValueError(
                f"{setting} needs more than the top k, and teacher.placement server gives no more; "
                f"take {way_out}"
            )
    if teacher.cache_form != "topk":
        raise ValueError(
            f"teacher.cache_form is {teacher.cache_form!r}, and teacher.placement server gives the most "
            "probable tokens alone; take topk"
        )
    if objective.kd_temperature != 1:
        raise ValueError(
            f"objective.kd_temperature is {objective.kd_temperature:g}, and the probabilities of "
            "teacher.placement server are at 1; those at another need all tokens, not the top k. Take 1"
        )


def _check_candidates(config: Config) -> None:
    """Raise ValueError where the student's candidates have no use, or are not enough."""
    setting = f"teacher.server_candidates is {config.teacher.server_candidates!r}"
    if config.teacher.server_candidates == "teacher":
        return
    if (placement := config.teacher.placement) != "server":
        raise ValueError(f"{setting}, which goes with teacher.placement server, and that is {placement!r}")
    if not config.on_policy.share:
        raise ValueError(
            f"{setting}, and on_policy.share is 0: the data's text is scored once, before training, and the "
            "student's candidates change with every step; set on_policy.share, or take teacher"
        )
    if (divergence := config.objective.divergence) in (*SAMPLED, "top1"):
        what = "teacher's most probable token" if divergence == "top1" else "drawn tokens alone"
        raise ValueError(
            f"{setting}, and objective.divergence {divergence} needs the {what}; take teacher, or another "
            "divergence, such as reverse"
        )


def _check_url(setting: str, url: str) -> None:
    """Raise ValueError unless this is the address of a server and nothing more."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # which raises for what is no port
    except ValueError as error:  # as of brackets that are no IPv6 address
        raise ValueError(f"{setting} is no address: {str(error)[:100]}") from error
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{setting} holds more than an address (not shown, since it may be secret); a key belongs in the "
            "environment variable IBDISTILL_TEACHER_API_KEY alone"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{setting} is {shown(url)}; give http://HOST:PORT or https://HOST")
