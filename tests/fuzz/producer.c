/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The producer against a consumer that writes anything at any time.
 *
 * Codes 0 to 15 are our calls, the others the peer's. It writes its two words as
 * it likes; and it also has the real consumer, so that the ring goes round.
 */
#include "world.h"

enum { LOANS = 8 };

struct loan {
	struct kucomms_frame *frame;	/* NULL: committed or dropped */
	struct kucomms_pin pin;
	int pinned;
	uint32_t length;
	uint8_t seed;
	const unsigned char *data;
	uint64_t position;
};

static struct {
	uint64_t position, consumed, sent, bytes, full, publishes, errors, rings;
	uint8_t seed;
	struct loan loans[LOANS];
} s;

static void program_begin(uint64_t position)
{
	memset(&s, 0, sizeof(s));
	s.position = position;
	s.consumed = position;
}

static void program_end(void)
{
}

static void check_all(void)
{
	const struct kucomms_ring_producer *p = &a.tx;
	const struct loan *loan;

	/* The ring is as long as it is, wherever the peer says that it reads. */
	CHECK(!(p->position % 8 || p->consumed % 8));
	CHECK(p->position == s.position);
	CHECK(p->position - p->consumed <= RING_SIZE);
	CHECK(p->consumed - s.consumed <= p->position - s.consumed);
	CHECK(kucomms_ring_room(p) <= RING_SIZE);
	CHECK(p->high_water <= RING_SIZE);
	CHECK(raw_producer->position == p->position);
	CHECK(raw_producer->parked == p->parked);
	CHECK(raw_producer->wanted == p->wanted);
	/* No other message got what is reserved or pinned, whatever the peer says. */
	for (loan = s.loans; loan < s.loans + LOANS; loan++) {
		if (!loan->frame && !loan->pinned)
			continue;
		CHECK(p->position - loan->position <= RING_SIZE);
		CHECK(!memcmp(loan->data, pattern + loan->seed, loan->length));
		if (loan->frame)
			CHECK((int64_t)(loan->position - p->consumed) >= 0);
	}
	CHECK(a.messages_sent == s.sent);
	CHECK(a.bytes_sent == s.bytes);
	CHECK(a.full_waits == s.full);
	CHECK(a.publishes == s.publishes);
	CHECK(a.protocol_errors == s.errors);
	CHECK(a.doorbells_rung == s.rings);
	s.consumed = p->consumed;
}

static void rang(int must_ring)
{
	CHECK(must_ring == 0 || must_ring == 1);
	s.rings += (unsigned int)must_ring;
}

/* What came of an attempt to take room. Return: 1 when it was got. */
static int took(uint32_t length, int err)
{
	uint64_t span = kucomms_frame_span(length);

	CHECK(!err || err == -EAGAIN || err == -EMSGSIZE || err == -EPROTO);
	CHECK((err == -EMSGSIZE) == (length > LENGTH_MAX));
	s.full += err == -EAGAIN;
	s.errors += err == -EPROTO;
	if (err)
		return 0;
	CHECK(a.tx.position == s.position + span);
	CHECK(!a.tx.wanted);
	s.position += span;
	s.sent++;
	s.bytes += length;
	s.publishes++;
	return 1;
}

static void check_frame(uint64_t position, uint32_t length, uint32_t flags)
{
	const struct kucomms_frame *frame = (const struct kucomms_frame *)
		(raw_data + position % RING_SIZE);

	CHECK(frame->control == kucomms_frame_control(length, flags, 0));
}

/* A message with buffers, what is given back, or news of a pool. */
static void put_front(const struct operation *operation,
		      const unsigned char *data, uint32_t length)
{
	uint32_t buffers = 1 + operation->y % 3, front = buffers * 16;
	uint32_t flags = operation->x & KUCOMMS_FLAG_NOTICE;
	uint32_t kind = operation->x & 32 ? KUCOMMS_KIND_POOL :
					    kucomms_frame_kind(buffers);
	int counted = kind != KUCOMMS_KIND_POOL && !flags;
	const struct kucomms_frame *frame = (const struct kucomms_frame *)
		(a.tx.data + s.position % RING_SIZE);
	int err;

	err = kucomms_channel_put_front_locked(&a, kind, flags, pattern, front,
					       data, length, 1, 2, 3);
	CHECK(!err || err == -EAGAIN || err == -EMSGSIZE || err == -EPROTO);
	CHECK((err == -EMSGSIZE) ==
	      ((uint64_t)length + front > LENGTH_MAX));
	s.errors += err == -EPROTO;
	s.full += counted && err == -EAGAIN;
	if (err)
		return;
	CHECK(frame->control ==
	      kucomms_frame_control(front + length, flags, kind));
	CHECK(!memcmp(frame + 1, pattern, front));
	CHECK(!memcmp((const char *)(frame + 1) + front, data, length));
	s.position += kucomms_frame_span(front + length);
	CHECK(a.tx.position == s.position && !a.tx.wanted);
	s.publishes++;
	s.sent += (unsigned int)counted;
	s.bytes += counted ? length : 0;
}

static void our_call(const struct operation *operation)
{
	struct loan *loan = &s.loans[operation->x % LOANS];
	uint32_t flags = operation->x & KUCOMMS_FLAG_REPLY;
	uint32_t length = length_of(operation);
	uint8_t seed = ++s.seed;
	uint64_t number, before = s.position;
	struct kucomms_geometry expected;
	struct kucomms_frame *frame;
	int result;

	switch (operation->code) {
	case 0:
		result = kucomms_channel_put(&a, pattern + seed, length, flags,
					     1, 2, 3);
		if (took(length, result))
			check_frame(before, length, flags);
		break;
	case 1:
		if (operation->x & 8) {
			put_front(operation, pattern + seed, length);
			break;
		}
		result = kucomms_channel_put_locked(&a, pattern + seed, length,
						    flags, 1, 2, 3);
		if (took(length, result))
			check_frame(before, length, flags);
		break;
	case 2:
		result = kucomms_channel_send(&a, pattern + seed, length, flags,
					      1, 2, 3);
		if (took(length, result < 0 ? result : 0)) {
			check_frame(before, length, flags);
			rang(result);
		}
		break;
	case 3:
	case 4:
		if (loan->frame || loan->pinned)
			break;
		result = kucomms_channel_reserve(&a, length, &frame,
						 operation->code == 3 ?
						 &loan->pin : NULL);
		if (!took(length, result))
			break;
		check_frame(before, length, KUCOMMS_FLAG_BUSY);
		CHECK((unsigned char *)frame ==
		      a.tx.data + before % RING_SIZE);
		kucomms_channel_fill(frame, pattern + seed, length, 1, 2, 3);
		loan->frame = frame;
		loan->data = (const unsigned char *)(frame + 1);
		loan->pinned = operation->code == 3;
		loan->position = before;
		loan->length = length;
		loan->seed = seed;
		break;
	case 5:
		if (!loan->frame)
			break;
		kucomms_ring_commit(loan->frame, loan->length, flags);
		check_frame(loan->position, loan->length, flags);
		rang(kucomms_channel_publish(&a));
		if (loan->pinned)
			kucomms_channel_unpin_tx(&a, &loan->pin);
		loan->frame = NULL;
		loan->pinned = 0;
		break;
	case 6:
		/* Pinned, a view of it may live on. */
		if (!loan->frame)
			break;
		rang(kucomms_channel_discard(&a, loan->frame, loan->length));
		check_frame(loan->position, loan->length, KUCOMMS_FLAG_DISCARD);
		s.sent--;
		s.bytes -= loan->length;
		loan->frame = NULL;
		break;
	case 7:
		if (loan->frame || !loan->pinned)
			break;
		kucomms_channel_unpin_tx(&a, &loan->pin);
		loan->pinned = 0;
		break;
	case 8:
		result = kucomms_channel_park_tx(&a, length);
		if (result == -EAGAIN)
			break;
		CHECK(a.tx.wanted == kucomms_frame_span(length));
		s.publishes++;
		rang(result);
		break;
	case 9:
		kucomms_channel_unpark_tx(&a);
		CHECK(!a.tx.wanted);
		break;
	case 10:
		number = kucomms_channel_tx_avail(&a);
		CHECK(number <= RING_SIZE && !(number % 8));
		break;
	case 11:
		number = kucomms_channel_tx_free(&a);
		CHECK(number <= RING_SIZE && !(number % 8));
		break;
	case 12:
		rang(kucomms_channel_publish(&a));
		break;
	case 13:
		kucomms_channel_close(&a, operation->x % 3);
		CHECK(raw_producer->state == operation->x % 3);
		break;
	case 14:
		/* Side 1's pages cannot pass for side 0's, nor for other sizes. */
		kucomms_geometry_fill(&expected, 1, RING_SIZE, 0);
		result = kucomms_geometry_check(&expected, operation->x & 1,
						RING_SIZE << (operation->y & 1), 0);
		CHECK(result == (operation->x & 1 && !(operation->y & 1) ?
				 0 : -EPROTO));
		break;
	default:
		/* Until it is full, or the peer misbehaves. */
		length = 200 + length % 256;
		do {
			result = kucomms_channel_send(&a, pattern, length, 0, 0,
						      0, 0);
			if (took(length, result < 0 ? result : 0))
				rang(result);
			check_all();
		} while (result >= 0 && a.tx.position - before <= RING_SIZE);
		break;
	}
}

static void peer_acts(const struct operation *operation)
{
	struct kucomms_view view;

	switch (operation->code) {
	case 16:
	case 17:
		raw_consumer->position =
			number_of(operation, raw_consumer->position);
		break;
	case 18:
	case 19:
		raw_consumer->position = number_of(operation, a.tx.consumed);
		break;
	case 20:
	case 21:
		raw_consumer->position = number_of(operation, a.tx.position);
		break;
	case 22:
		raw_consumer->parked = number_of(operation, a.tx.rung);
		break;
	case 23:
		raw_consumer->parked = number_of(operation,
						 raw_consumer->parked);
		break;
	case 24:
		kucomms_channel_park_rx(&b);
		break;
	case 25:
		kucomms_channel_release_lazily(&b);
		break;
	default:
		if (!kucomms_channel_peek(&b, &view))
			kucomms_channel_advance(&b, &view);
		kucomms_channel_release(&b);
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
