"""Holds what goes over a broker to the document that `edged schema asyncapi` prints.

Read as any program outside would read it: channels by their addresses, the payloads' schemas, QoS
and retain by the operations' bindings.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import jsonschema

from edged.asyncapi import document

Body = dict[str, Any]


class Document:
    """The document, for the device whose topics begin with `root`."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._made = _document()
        self._topics = {
            str(name): re.compile("[^/]+".join(map(re.escape, re.split(r"\{\w+\}", address))))
            for name, channel in self._made["channels"].items()
            if channel["address"] is not None
            for address in (channel["address"].replace("{base_topic}/{device}", root),)
        }
        #: What edged sends and hears, by channel: message -> QoS, retained.
        self._sent = self._bindings("send")
        self._heard = self._bindings("receive")
        self._sent["reply"] = {
            message: binding
            for messages in self._sent.values()
            for message, binding in messages.items()
            if message in self._made["channels"]["reply"]["messages"]
        }

    def _bindings(self, action: str) -> dict[str, dict[str, tuple[int, bool]]]:
        found: dict[str, dict[str, tuple[int, bool]]] = {}
        for operation in self._made["operations"].values():
            if operation["action"] == action:
                binding = operation["bindings"]["mqtt"]
                told = found.setdefault(_last(operation["channel"]), {})
                for message in operation["messages"]:
                    told[_last(message)] = (binding["qos"], binding["retain"])
        return found

    def channel(self, topic: str) -> str | None:
        """Return the channel of a topic; below our root it has one, elsewhere it is a reply."""
        if not topic.startswith(f"{self._root}/"):
            return "reply"
        return next((name for name, form in self._topics.items() if form.fullmatch(topic)), None)

    def is_told(self, topic: str) -> bool:
        """Return whether edged, and no client, publishes on this topic."""
        return self.channel(topic) not in self._heard

    @property
    def told(self) -> set[str]:
        """The names of all messages that edged publishes."""
        return {message for messages in self._sent.values() for message in messages}

    def message(self, topic: str, body: Body) -> str | None:
        """Return which message edged published here; where there may be several, its type says."""
        messages = self._sent.get(self.channel(topic) or "", {})
        name = next(iter(messages)) if len(messages) == 1 else str(body.get("type", ""))
        return name if name in messages else None

    def told_wrong(
        self, topic: str, body: Body, *, qos: int | None = None, retain: bool | None = None
    ) -> Iterator[str]:
        """Yield what is wrong with something that edged published.

        Args:
            topic: where.
            body: the payload.
            qos, retain: as it came, if that says how it was published.
        """
        channel = self.channel(topic)
        if channel is None:
            yield "no channel has this topic"
            return
        message = self.message(topic, body)
        if message is None:
            yield f"there is no type {body.get('type', '')!r}"
            return
        wanted = self._sent[channel][message]
        if qos not in {None, wanted[0]}:
            yield f"QoS {qos}, it must be {wanted[0]}"
        if retain not in {None, wanted[1]}:
            yield "it must be retained" if wanted[1] else "it must not be retained"
        yield from _schema_wrong(message, body)


@functools.cache
def validator(message: str) -> jsonschema.Draft7Validator:
    """Return what checks a message's payload; `textRequest` is one, `heartbeat` another."""
    made = _document()
    name = _last(made["components"]["messages"][message]["payload"])
    schemas = made["components"]["schemas"]
    return jsonschema.Draft7Validator({**schemas[name], "components": {"schemas": schemas}})


def _schema_wrong(message: str, body: Body) -> Iterator[str]:
    for error in validator(message).iter_errors(body):
        where = "".join(f"{step}: " for step in error.absolute_path)
        yield where + error.message[:300]


def _last(reference: Body) -> str:
    return str(reference["$ref"]).rsplit("/", 1)[1]


@functools.cache
def _document() -> Body:
    return document()
