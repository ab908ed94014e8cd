/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The consumer against a producer that writes anything at any time.
 *
 * Codes 0 to 15 are our calls, the others the peer's. It writes its words, the
 * geometry and the data as it likes; and it also has the real producer, so that
 * what is nonsense comes in the middle of what is not. It knows no turns; we do in one
 * of eight programs.
 */
#include "world.h"

enum { PINS = 8, LOANS = 4 };

static struct {
	uint64_t published, available, last, received, bytes, errors, rings, releases;
	struct kucomms_view view;
	int has_view;
	int all_seen;
	int turns, ours;
	struct kucomms_pin pins[PINS];
	int pinned[PINS];
	struct kucomms_frame *loan[LOANS];
	uint32_t loan_length[LOANS];
} s;

static void program_begin(uint64_t position)
{
	memset(&s, 0, sizeof(s));
	s.published = position;
	s.available = position;
	s.turns = (position >> 5) % 8 == 2;
	s.ours = s.turns;
	b.turn = s.turns ? KUCOMMS_TURN_OURS : KUCOMMS_TURN_ANY;
	b.turn_at = UINT64_MAX;
}

static void program_end(void)
{
}

static void check_all(void)
{
	const struct kucomms_ring_consumer *c = &b.rx;
	unsigned int i;

	/* Nothing goes back, nothing runs ahead. */
	CHECK(!(c->position % 8 || c->published % 8 || c->available % 8));
	CHECK(c->available - s.available <= RING_SIZE);
	CHECK(c->published - s.published <= RING_SIZE);
	CHECK(c->available - c->published <= RING_SIZE);
	CHECK(c->position - c->published <= c->available - c->published);
	CHECK(c->high_water <= RING_SIZE);
	/* What the producer adds after its end is not read. */
	CHECK(!s.all_seen || c->available == s.last);
	CHECK(raw_consumer->position == c->published);
	CHECK(raw_consumer->parked == c->parked);
	/* What is pinned was not given back. */
	for (i = 0; i < PINS; i++)
		CHECK(!s.pinned[i] || s.pins[i].position - c->published <
					      c->position - c->published);
	CHECK(kucomms_channel_has_turns(&b) == s.turns);
	CHECK(kucomms_channel_has_turn(&b) == (!s.turns || s.ours));
	CHECK(b.messages_received == s.received);
	CHECK(b.bytes_received == s.bytes);
	CHECK(b.protocol_errors == s.errors);
	CHECK(b.doorbells_rung == s.rings);
	CHECK(b.releases == s.releases);
	s.published = c->published;
	s.available = c->available;
}

static void peek(void)
{
	const struct kucomms_ring_consumer *c = &b.rx;
	struct kucomms_view *view = &s.view;
	uint64_t left;
	int err;

	begin(&c->peer->position);
	err = kucomms_channel_peek(&b, view);
	/* It looks at the position once, so nobody can hold it in the loop. */
	CHECK(watched_loads <= 1);
	/* Two for each frame that is skipped; some of a message, or of none. */
	CHECK(accesses <= 5 + 2 * (KUCOMMS_SKIP_MOST - 1));
	if (c->final && watched_loads && err != -EPROTO && !s.all_seen) {
		s.all_seen = 1;
		s.last = c->available;
	}
	s.has_view = !err;
	s.errors += err == -EPROTO;
	CHECK(err == -EAGAIN || err == -EPROTO || err == KUCOMMS_SKIPPED ||
	      !err);
	if (err == KUCOMMS_SKIPPED)
		CHECK(accesses >= 2 * KUCOMMS_SKIP_MOST);
	else if (err == -EAGAIN)
		CHECK(accesses <= 2 + 2 * (KUCOMMS_SKIP_MOST - 1));
	if (err)
		return;
	left = c->available - c->position;
	CHECK(left >= 32 && view->length <= left - 32);
	CHECK(view->data == c->data + c->position % RING_SIZE + 32);
	CHECK(view->kind < 32 && c->kinds & 1u << view->kind);
	if (view->flags & KUCOMMS_FLAG_TOKEN) {
		CHECK(s.turns && !view->length &&
		      view->flags == KUCOMMS_FLAG_TOKEN);
	} else if (view->kind == KUCOMMS_KIND_BUFFER) {
		CHECK(!(view->flags & ~(uint32_t)(KUCOMMS_FLAG_REPLY |
						  KUCOMMS_FLAG_NOTICE)));
		CHECK(view->buffers && view->buffers <= KUCOMMS_CARRIED_MAX);
		CHECK(view->buffers * sizeof(struct kucomms_carried) <=
		      view->length);
	} else {
		CHECK(!(view->flags & ~(uint32_t)KUCOMMS_FLAG_REPLY));
		CHECK(!view->buffers);
	}
	/* It has not sent twice. */
	CHECK(!s.ours || !kucomms_kind_is_message(view->kind, view->flags));
	if (view->length) {
		(void)*(const volatile unsigned char *)view->data;
		(void)*(const volatile unsigned char *)(view->data +
							view->length - 1);
	}
}

/* What was seen is handed out, or is between the keepers of pools. */
static void take(void)
{
	s.has_view = 0;
	if (s.view.kind == KUCOMMS_KIND_MESSAGE) {
		s.ours = s.turns;
		s.received++;
		s.bytes += s.view.length;
		kucomms_channel_advance(&b, &s.view);
		return;
	}
	if (s.view.kind == KUCOMMS_KIND_BUFFER &&
	    !(s.view.flags & KUCOMMS_FLAG_NOTICE)) {
		s.ours = s.turns;
		s.received++;
		s.bytes += s.view.length -
			   s.view.buffers * sizeof(struct kucomms_carried);
	}
	kucomms_channel_advance_front(&b, &s.view);
}

static int rang(int must_ring)
{
	CHECK(must_ring == 0 || must_ring == 1);
	s.rings += (unsigned int)must_ring;
	return must_ring;
}

static void our_call(const struct operation *operation)
{
	static struct kucomms_channel *const channels[] = { &b };
	const struct kucomms_geometry *geometry =
		(const struct kucomms_geometry *)b.side[0].control;
	struct kucomms_geometry expected;
	uint64_t waiting;
	int is_right;
	int result;
	unsigned int slot = operation->x % PINS;

	switch (operation->code) {
	case 0:
		peek();
		break;
	case 1:
		if (!s.has_view)
			peek();
		if (s.has_view)
			take();
		break;
	case 2:
		if (!s.has_view)
			peek();
		if (s.has_view && !s.pinned[slot] &&
		    s.view.kind == KUCOMMS_KIND_MESSAGE) {
			s.has_view = 0;
			s.ours = s.turns;
			s.received++;
			s.bytes += s.view.length;
			s.pinned[slot] = 1;
			kucomms_channel_borrow(&b, &s.view, &s.pins[slot]);
			CHECK(b.rx.pins.prev == &s.pins[slot]);
		}
		break;
	case 3:
		if (s.pinned[slot]) {
			s.pinned[slot] = 0;
			kucomms_channel_unpin_rx(&s.pins[slot]);
		}
		break;
	case 4:
		s.releases++;
		rang(kucomms_channel_release(&b));
		break;
	case 5:
		s.releases++;
		result = kucomms_channel_release_lazily(&b);
		if (result != -EAGAIN)
			rang(result);
		break;
	case 6:
		rang(kucomms_channel_wake_producer(&b));
		break;
	case 7:
		begin(&b.rx.peer->position);
		result = kucomms_channel_park_rx(&b);
		CHECK(watched_loads <= 1);
		CHECK(result == 0 || result == 1);
		s.has_view = 0;		/* it may have gone on */
		break;
	case 8:
		result = kucomms_channel_peer_starves(&b);
		CHECK(result == 0 || result == 1);
		break;
	case 9:
		waiting = kucomms_channel_rx_avail(&b);
		CHECK(waiting <= RING_SIZE && !(waiting % 8));
		break;
	case 10:
		result = kucomms_channels_poll(channels, operation->x & 1, 0);
		CHECK(result == 0 || (result == 1 && operation->x & 1));
		break;
	case 11:
		kucomms_ring_peer_state(&b.rx);
		/* As when we have sent something. */
		kucomms_channel_set_turn(&b, KUCOMMS_TURN_THEIRS);
		s.ours = 0;
		break;
	case 12:
		/* As when the peer was found dead: it never comes back. */
		b.rx.final |= operation->x & 1;
		s.has_view = 0;
		break;
	case 13:
		/* Said to be right: then it was at one moment. */
		kucomms_geometry_fill(&expected, 0, RING_SIZE, b.features);
		is_right = !memcmp(geometry, &expected, sizeof(expected));
		begin(geometry);
		result = kucomms_geometry_check(geometry, 0, RING_SIZE, b.features);
		CHECK(result == (is_right ? 0 : -EPROTO) ||
		      (!is_right && result == -EPROTONOSUPPORT));
		break;
	default:
		/* All there is, as a busy receiver does. */
		for (peek(); s.has_view; peek()) {
			take();
			if (operation->x & 1) {
				s.releases++;
				rang(kucomms_channel_release(&b));
			}
			check_all();
		}
		break;
	}
}

static void peer_acts(const struct operation *operation)
{
	uint64_t front = b.rx.position % RING_SIZE;
	struct kucomms_frame *frame = (struct kucomms_frame *)(raw_data + front);
	uint64_t *word;
	unsigned int slot = operation->x % LOANS;
	unsigned int i;

	switch (operation->code) {
	case 16:
		raw_producer->position =
			number_of(operation, raw_producer->position);
		break;
	case 17:
		raw_producer->position = number_of(operation, b.rx.position);
		break;
	case 18:
		raw_producer->parked = number_of(operation, b.rx.rung);
		break;
	case 19:
		raw_producer->wanted =
			number_of(operation, raw_producer->wanted);
		break;
	case 20:
		raw_producer->state = (uint32_t)number_of(operation, 0);
		break;
	case 21:
		frame->control = number_of(operation, frame->control);
		break;
	case 22:
		/* Of each kind, with as many buffers as it likes. */
		frame->control = kucomms_frame_control(length_of(operation),
						       operation->x & 15,
						       (operation->x >> 4) & 3);
		if (operation->z & 1)
			frame->control |= (uint64_t)KUCOMMS_FLAG_NOTICE << 32;
		if (operation->z & 2)
			frame->control |= (uint64_t)operation->y << 56;
		break;
	case 23:
		word = (uint64_t *)(raw_data + (front + operation->x * 8u) %
						       RING_SIZE);
		*word = kucomms_frame_control(length_of(operation),
					      operation->z & 7, 0);
		break;
	case 24:
		raw[operation->x % sizeof(struct kucomms_geometry)] ^=
			operation->y;
		break;
	case 25:
		if (operation->x & 2)
			kucomms_channel_put_front_locked(&a,
				kucomms_frame_kind(1 + (operation->x >> 4)),
				operation->x & KUCOMMS_FLAG_NOTICE, pattern,
				16u * (1 + (operation->x >> 4)), pattern,
				length_of(operation), 1, 2, 3);
		else
			kucomms_channel_send(&a, pattern + operation->x,
					     length_of(operation),
					     operation->x & (KUCOMMS_FLAG_REPLY |
							     KUCOMMS_FLAG_TOKEN),
					     1, 2, 3);
		break;
	case 26:
		if (!s.loan[slot] &&
		    kucomms_channel_reserve(&a, length_of(operation),
					    &s.loan[slot], NULL))
			s.loan[slot] = NULL;
		s.loan_length[slot] = length_of(operation);
		break;
	case 27:
		if (s.loan[slot])
			kucomms_ring_commit(s.loan[slot], s.loan_length[slot],
					    0);
		s.loan[slot] = NULL;
		break;
	case 28:
		if (s.loan[slot])
			kucomms_channel_discard(&a, s.loan[slot],
						s.loan_length[slot]);
		s.loan[slot] = NULL;
		break;
	case 29:
		/* Nothing but what has to be skipped. */
		for (i = 0; i < RING_SIZE; i += 32)
			((struct kucomms_frame *)(raw_data + i))->control =
				(uint64_t)KUCOMMS_FLAG_DISCARD << 32;
		break;
	case 30:
		kucomms_channel_park_tx(&a, length_of(operation));
		break;
	default:
		kucomms_channel_close(&a, operation->x % 3);
		break;
	}
}

static void perform(const struct operation *operation, int nested)
{
	if (operation->code >= 16) {
		inside = 1;
		peer_acts(operation);
		inside = nested;
	} else if (!nested) {
		our_call(operation);
	}
}
