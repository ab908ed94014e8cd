# SPDX-License-Identifier: MIT
"""Bugs to plant in a copy of the headers: each has to be found by a target."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from . import harness


@dataclass(frozen=True)
class Plant:
    """One bug: ``old`` is replaced by ``new`` in a header."""

    name: str
    target: str
    old: str
    new: str
    header: str = "ring.h"


PLANTS = (
    Plant(
        "unchecked-length",
        "consumer",
        "span > c->available - c->position ||",
        "",
    ),
    Plant(
        "unchecked-flags",
        "consumer",
        "flags & ~(__u32)KUCOMMS_FLAGS ||",
        "",
    ),
    Plant(
        "unchecked-number-of-buffers",
        "consumer",
        "return buffers && (__u32)control >=\n\t       buffers * "
        "(__u32)sizeof(struct kucomms_carried);",
        "return buffers != 0;",
    ),
    Plant(
        "kind-that-was-not-agreed-on",
        "consumer",
        "kind >= 32 ||\n\t    !(c->kinds & (__u32)1 << kind))",
        "kind >= 3 + 0 * c->kinds)",
    ),
    Plant(
        "notice-without-buffers",
        "consumer",
        "return !buffers && !(flags & KUCOMMS_FLAG_NOTICE);",
        "return !buffers;",
    ),
    Plant(
        "unchecked-producer-position",
        "consumer",
        "seen - c->published > c->size ||",
        "",
    ),
    Plant(
        "producer-position-goes-back",
        "consumer",
        "||\n\t    seen - c->published < c->available - c->published)",
        ")",
    ),
    Plant(
        "unchecked-consumer-position",
        "producer",
        "||\n\t    seen - p->consumed > limit - p->consumed)",
        "||\n\t    limit & 1)",
    ),
    Plant(
        "loan-freed-by-the-consumer",
        "producer",
        "\t\tif (p->held_count)\n\t\t\tlimit = p->held[0];\n",
        "",
    ),
    Plant(
        "loan-forgotten-behind-another",
        "producer",
        "p->held[kept++] = p->held[i];",
        "kept = i ? kept : 1;",
    ),
    Plant(
        "double-fetch-of-length",
        "consumer",
        "view->length = (__u32)control;",
        "view->length = (__u32)READ_ONCE(frame->control);",
    ),
    Plant(
        "double-fetch-of-length-unmarked",
        "consumer",
        "view->length = (__u32)control;",
        "view->length = (__u32)frame->control;",
    ),
    Plant(
        "double-fetch-of-producer-position",
        "consumer",
        "c->available = seen;",
        "c->available = c->peer->position;",
    ),
    Plant(
        "double-fetch-of-consumer-position",
        "producer",
        "p->consumed = seen;",
        "p->consumed = p->peer->position;",
    ),
    Plant(
        "double-fetch-of-geometry",
        "consumer",
        "return memcmp(&seen, &expected, sizeof(seen))",
        "return memcmp(shared, &expected, sizeof(seen))",
        header="channel.h",
    ),
    Plant(
        "sends-twice",
        "consumer",
        "if (turn == KUCOMMS_TURN_OURS &&",
        "if (turn > KUCOMMS_TURN_THEIRS &&",
        header="channel.h",
    ),
    Plant(
        "token-with-data",
        "consumer",
        "(turn == KUCOMMS_TURN_ANY || view->length ||",
        "(turn == KUCOMMS_TURN_ANY ||",
        header="channel.h",
    ),
    Plant(
        "token-without-turns",
        "consumer",
        "(turn == KUCOMMS_TURN_ANY || view->length ||",
        "(view->length ||",
        header="channel.h",
    ),
    Plant(
        "held-in-the-loop",
        "consumer",
        "refreshed = 1;",
        "",
    ),
    Plant(
        "skips-without-end",
        "consumer",
        "if (++skipped == KUCOMMS_SKIP_MOST)",
        "if (++skipped == 0)",
    ),
    Plant(
        "served-after-its-end",
        "consumer",
        "if (c->all_seen)\n\t\treturn 0;",
        "",
    ),
    Plant(
        "pins-given-back",
        "pair",
        "__u64 end = kucomms_pins_oldest(&c->pins, c->position);",
        "__u64 end = c->position;",
    ),
    Plant(
        "no-look-after-parking",
        "pair",
        "return kucomms_ring_peek(c, &view) != -EAGAIN || c->position != before;",
        "(void)view; return c->position != before;",
    ),
    Plant(
        "no-look-for-space-after-parking",
        "pair",
        "if (kucomms_ring_has_room(p, span) == -EAGAIN)\n\t\treturn 0;",
        "if (span)\n\t\treturn 0;",
    ),
    Plant(
        "published-before-written",
        "pair",
        "\tWRITE_ONCE(frame->control, kucomms_frame_control(length, flags, kind));\n"
        "\tkucomms_ring_move(p, length);",
        "\tkucomms_ring_move(p, length);\n"
        "\tWRITE_ONCE(frame->control, kucomms_frame_control(length, flags, kind));",
    ),
)


def build(plant: Plant, folder: Path) -> Path:
    """Build the plant's target in ``folder``, with the bug. Return: the program."""
    include = folder / "include"
    shutil.copytree(harness.INCLUDE, include)
    header = include / "kucomms" / plant.header
    text = header.read_text()
    if text.count(plant.old) != 1:
        raise LookupError(f"{plant.name}: not once in {plant.header}: {plant.old}")
    header.write_text(text.replace(plant.old, plant.new))
    program = folder / plant.target
    # They are built to be run a few times.
    harness.make("OPTIMISE=-O0", str(program), build=folder, include=include)
    return program
