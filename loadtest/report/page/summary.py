"""The top of the page: what was run, what it came to, whether that can be believed, the key numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtest.conditions import ConditionError, parse_condition, time_of
from loadtest.early_stopping import samples_needed
from loadtest.report.page.layout import NOTHING, bullets, section, table
from loadtest.report.page.markup import Markup, element, join
from loadtest.report.page.quantities import counted, grouped, milliseconds, percent, significant
from loadtest.validity import ACHIEVED, BUSIEST_CORE

if TYPE_CHECKING:
    from loadtest.result import Checked, RunResult

_MOST_NAMES = 6
_EXTRAS = {
    "goodput_ratio": "goodput of capacity", "reloads": "reloads", "failed_reloads": "failed reloads",
    "memory_growth": "memory growth", "memory_peak": "memory peak",
}  # fmt: skip


def title_of(result: RunResult) -> str:
    """The models, as many as a title has room for."""
    found = [str(model["name"]) for model in result.models]
    more = f" and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
    return (", ".join(found[:_MOST_NAMES]) + more) or "no model"


def headline(result: RunResult) -> Markup:
    """Models, load, server; the verdict and the validity as badges."""
    target = result.target
    server = " ".join(filter(None, (target.get("server"), target.get("version")))) or "a server"
    tls = ", TLS" if target.get("tls") == "yes" else ""
    load = result.load[:1].upper() + result.load[1:]
    return element(
        "header",
        element("p", f"Load test, scenario {result.scenario}, {_when(result.started)}", class_="eyebrow"),
        element("h1", title_of(result)),
        element("p", load, class_="load"),
        element("p", f"{server} at {target.get('url', '')}{tls}", class_="server"),
        element("p", _verdict(result), " ", _believed(result), class_="badges"),
    )  # fmt: skip


def _when(started: str) -> str:
    return started.replace("T", " ").replace("+00:00", " UTC")


def _badge(text: str, style: str, said: str) -> Markup:
    return element("span", element("strong", text), f" {said}", class_=f"badge {style}")


def _verdict(result: RunResult) -> Markup:
    verdict, asked = result.verdict, len(result.conditions)
    met = sum(checked.failed for checked in result.conditions)
    if verdict == "failed":
        return _badge("failed", "bad", _why_failed(result, met))
    if verdict == "invalid":
        proved = f"{met} of {counted(asked, 'condition')} would fail it" if met else "no condition fails it"
        return _badge("invalid", "warning", f"verdict: {proved}, but nothing is proved")
    if asked:
        return _badge("passed", "good", f"{counted(asked, 'condition')} asked")
    return _badge("no conditions", "neutral", "were asked; all requests were answered")


def _why_failed(result: RunResult, met: int) -> str:
    if met:
        return f"by {met} of {counted(len(result.conditions), 'condition')}"
    if not result.total.answered:
        return "no request was answered"
    return f"{grouped(result.total.failed)} of {counted(result.total.offered, 'request')}"


def _believed(result: RunResult) -> Markup:
    if result.validity.valid:
        return _badge("valid", "good", "figures")
    return _badge("invalid", "warning", "figures: see why below")


def conditions(result: RunResult) -> Markup:
    """What was asked, and the figure that it was asked of."""
    rows = [
        [element("code", checked.text), _figure_of(checked), _outcome(result, checked)]
        for checked in result.conditions
    ]
    return section("Conditions", table(["fails if", "measured", "outcome"], rows))


def _outcome(result: RunResult, checked: Checked) -> Markup:
    if not checked.failed:
        return element("span", "ok", class_="good")
    if result.validity.generator_limited and not checked.of_server:
        return element("span", "failed, or the load generator did", class_="warning")
    return element("span", "failed", class_="bad")


def _figure_of(checked: Checked) -> str:
    try:
        condition = parse_condition(checked.text)
    except ConditionError:
        return significant(checked.value)
    if time_of(condition.metric) is not None:
        return milliseconds(checked.value)
    return percent(checked.value, 2) if condition.unit == "%" else significant(checked.value)


def validity(result: RunResult) -> Markup:
    """Whether the figures are the server's, and by what that is judged."""
    found = result.validity
    judged = [f"busiest process {percent(found.busiest_core)} of a core (at most {percent(BUSIEST_CORE, 0)})"]
    if result.load.startswith("open"):
        judged = [
            f"lag p99 {milliseconds(found.lag_p99)} behind the schedule",
            *judged,
            f"achieved {percent(found.achieved)} of the offered rate (at least {percent(ACHIEVED, 0)})",
        ]
    else:
        judged.append(
            "a closed loop slows down with its server, so its tail is too kind: no figure for a release"
        )
    if found.valid:
        head = element("p", element("strong", "Valid"), ": the load generator kept up with its load.")
        style = "box good"
    else:
        head = join([
            element("p", element("strong", "INVALID"), ": these figures are not the server's alone."),
            bullets(found.reasons, "reasons"),
        ])  # fmt: skip
        style = "box warning"
    return section("Validity", element("div", head, bullets(judged, "judged"), class_=style))


def key_numbers(result: RunResult) -> Markup:
    """The few numbers that most come for."""
    total = result.total
    cards = [
        _card("throughput", f"{significant(total.throughput)}", "requests/s",
              f"{grouped(total.answered)} of {grouped(total.offered)} answered"),
        *(_percentile_card(result, percent) for percent in (50.0, 99.0, 99.9)),
        _card("errors", grouped(total.failed), "",
              f"{percent(total.failed / max(1, total.offered), 2)} of requests",
              "bad" if total.failed else ""),
    ]  # fmt: skip
    if total.stream:
        first, inter = total.stream.first_token, total.stream.inter_token
        cards += [
            _card("tokens", significant(total.stream.tokens_per_second), "tokens/s",
                  f"{grouped(total.stream.tokens)} in all"),
            _card("first token p99", significant(first.percentile(99)), "ms",
                  f"p50 {milliseconds(first.percentile(50))}") if first.count else NOTHING,
            _card("inter-token p99", significant(inter.percentile(99)), "ms",
                  f"p50 {milliseconds(inter.percentile(50))}") if inter.count else NOTHING,
        ]  # fmt: skip
    cards += [_extra_card(name, value) for name, value in result.extras.items()]
    style = "cards" if result.validity.valid else "cards doubtful"
    return section("Key numbers", element("div", *cards, class_=style))


def _card(name: str, value: str, unit: str, below: str = "", style: str = "") -> Markup:
    return element(
        "div",
        element("span", name, class_="name"),
        element("span", element("b", value), f"\u202f{unit}" if unit else "", class_="value"),
        element("span", below, class_="below"),
        class_=f"card {style}".strip(),
    )  # fmt: skip


def _percentile_card(result: RunResult, percentile: float) -> Markup:
    name = f"latency p{percentile:g}"
    if not result.total.answered:
        return _card(name, "–", "", "no answers")
    below, key = "", f"{percentile:g}"
    if (bound := result.bounds.get(key)) is not None:
        below = f"at most {milliseconds(bound)}, 99 % sure"
    elif key in result.bounds:
        below = f"too few requests to be sure: {grouped(samples_needed(percentile))} needed"
    return _card(name, significant(result.total.latency.percentile(percentile)), "ms", below)


def _extra_card(name: str, value: float) -> Markup:
    shown, unit = significant(value), "MB" if name.startswith("memory_") else ""
    if name.endswith("_ratio"):
        shown, unit = significant(100 * value), "%"
    return _card(_EXTRAS.get(name, name.replace("_", " ")), shown, unit)
