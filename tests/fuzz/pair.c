/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Two sides that keep the rules, against a model: every message in order, whole
 * and once; nobody sleeps while there is something to do.
 *
 * Codes 0 to 15 are calls of the sender, the others of the receiver. One that is
 * put off is made between two accesses of the other side's call.
 */
#include "world.h"

enum { SENDER = 1, RECEIVER = 2 };
enum { LOANS = 6, PINS = 6, QUEUE = 1024 };

/* PENDING and DROPPING: a call that is being made; seen already, or not yet. */
enum state { BUSY, PENDING, COMMITTED, DROPPING, DISCARDED };

struct message {
	enum state state;
	uint32_t length;
	uint32_t flags;
	uint64_t seed;
	uint64_t position;
};

struct loan {
	struct kucomms_frame *frame;	/* NULL: committed or dropped */
	struct kucomms_pin pin;
	int pinned;
	const unsigned char *data;
	struct message *message;
	uint32_t length;
	uint64_t seed;
};

struct borrowed {
	struct kucomms_pin pin;
	int pinned;
	struct kucomms_view view;
	uint64_t seed;
};

static struct message queue[QUEUE];
static unsigned int queue_first, queue_end;

static struct {
	int calling;		/* whose call is being made, and interrupted */
	uint64_t seed;
	uint64_t committed, delivered, bytes;
	struct loan loans[LOANS];
	struct borrowed borrowed[PINS];
	unsigned int pins, loan_pins;
	/* the sender */
	int owes_bell;		/* committed, and not asked for the bell yet */
	int a_sleeps, a_rung;
	uint64_t a_wants;
	/* the receiver */
	int owes_wake;		/* released lazily, and told to ask later */
	int b_sleeps, b_rung, b_starves;
} s;

static void program_begin(uint64_t position)
{
	(void)position;
	memset(&s, 0, sizeof(s));
	queue_first = 0;
	queue_end = 0;
}

static const unsigned char *data_of(uint64_t seed)
{
	return pattern + (uint8_t)seed;
}

static void rang_receiver(int must_ring)
{
	CHECK(must_ring == 0 || must_ring == 1);
	s.b_rung |= must_ring;
}

static void rang_sender(int must_ring)
{
	CHECK(must_ring == 0 || must_ring == 1);
	s.a_rung |= must_ring;
}

/* The sender would find room for what it sleeps for. */
static int sender_has_room(void)
{
	struct kucomms_ring_producer p = a.tx;

	p.consumed = b.rx.published;
	/* With no pin the list's head points to itself, which is not here. */
	if (a.tx.pins.next == &a.tx.pins)
		kucomms_pins_init(&p.pins);
	else
		p.pins.prev = NULL;
	return s.a_wants <= kucomms_ring_room(&p);
}

static void check_all(void)
{
	const struct message *front;

	CHECK(a.tx.position - b.rx.published <= RING_SIZE);
	CHECK(!a.protocol_errors && !b.protocol_errors);
	CHECK(b.messages_received == s.delivered);
	CHECK(b.bytes_received == s.bytes);
	while (queue_first != queue_end &&
	       queue[queue_first % QUEUE].state == DISCARDED &&
	       b.rx.position != queue[queue_first % QUEUE].position)
		queue_first++;
	front = queue_first == queue_end ? NULL : &queue[queue_first % QUEUE];
	if (s.b_sleeps && !s.b_rung && !s.owes_bell)
		CHECK(!front || front->state == BUSY);
	if (s.a_sleeps && !s.a_rung && !s.owes_wake)
		CHECK(!sender_has_room());
	/* Asleep, with pins that the other one sleeps for: it has to know. */
	if (s.b_sleeps && !s.b_rung && !s.b_starves && s.pins &&
	    b.rx.position == a.tx.position && a.tx.wanted)
		CHECK(a.tx.wanted <=
		      RING_SIZE - (a.tx.position - b.rx.published));
}

/* ---- the sender ----------------------------------------------------------- */

static struct message *queue_push(enum state state, uint32_t length,
				  uint32_t flags)
{
	struct message *message = &queue[queue_end++ % QUEUE];

	CHECK(queue_end - queue_first <= QUEUE);
	message->state = state;
	message->length = length;
	message->flags = flags;
	message->seed = ++s.seed;
	message->position = a.tx.position;
	return message;
}

/* What came of it. The message was in the queue while the call was made. */
static int queue_settle(struct message *message, enum state state, int err)
{
	CHECK(err == 0 || err == -EAGAIN || err == -EMSGSIZE);
	CHECK((err == -EMSGSIZE) == (message->length > LENGTH_MAX));
	if (err) {
		/* Nobody has got it, and nothing came after it. */
		queue_end--;
		CHECK(message == &queue[queue_end % QUEUE]);
		CHECK(message->state != DISCARDED);
		return 0;
	}
	if (message->state == PENDING)
		message->state = state;
	s.committed += state == COMMITTED;
	return 1;
}

static void send(const struct operation *operation, uint32_t length)
{
	uint32_t flags = operation->x & KUCOMMS_FLAG_REPLY;
	struct message *message = queue_push(PENDING, length, flags);
	uint64_t seed = message->seed;
	int with_bell = operation->code == 0;
	int result;

	if (with_bell)
		result = kucomms_channel_send(&a, data_of(seed), length, flags,
					      seed, ~seed, seed * 3);
	else
		result = kucomms_channel_put(&a, data_of(seed), length, flags,
					     seed, ~seed, seed * 3);
	if (!queue_settle(message, COMMITTED, result < 0 ? result : 0))
		return;
	if (with_bell) {
		s.owes_bell = 0;
		rang_receiver(result);
	} else {
		s.owes_bell = 1;
	}
}

static void ask_for_bell(void)
{
	s.owes_bell = 0;
	rang_receiver(kucomms_channel_publish(&a));
}

static void reserve(struct loan *loan, uint32_t length, int pinned)
{
	struct message *message;
	int err;

	if (loan->frame || loan->pinned)
		return;
	message = queue_push(BUSY, length, 0);
	err = kucomms_channel_reserve(&a, length, &loan->frame,
				      pinned ? &loan->pin : NULL);
	if (!queue_settle(message, BUSY, err)) {
		loan->frame = NULL;
		return;
	}
	kucomms_channel_fill(loan->frame, data_of(message->seed), length,
			     message->seed, ~message->seed, message->seed * 3);
	loan->data = (const unsigned char *)(loan->frame + 1);
	loan->pinned = pinned;
	s.loan_pins += (unsigned int)pinned;
	loan->message = message;
	loan->length = length;
	loan->seed = message->seed;
}

static void unpin_loan(struct loan *loan)
{
	if (!loan->pinned || loan->frame)
		return;
	CHECK(!memcmp(loan->data, data_of(loan->seed), loan->length));
	kucomms_channel_unpin_tx(&a, &loan->pin);
	loan->pinned = 0;
	s.loan_pins--;
	s.a_sleeps = 0;		/* it is told by its own side */
}

static void commit(struct loan *loan)
{
	struct message *message = loan->message;

	if (!loan->frame)
		return;
	message->state = PENDING;
	kucomms_ring_commit(loan->frame, loan->length, 0);
	loan->frame = NULL;
	if (message->state == PENDING)
		message->state = COMMITTED;
	s.committed++;
	s.owes_bell = 1;
	if (loan->pinned) {
		kucomms_channel_unpin_tx(&a, &loan->pin);
		loan->pinned = 0;
		s.loan_pins--;
		s.a_sleeps = 0;
	}
}

static void discard(struct loan *loan)
{
	struct message *message = loan->message;
	struct kucomms_frame *frame = loan->frame;

	if (!frame)
		return;
	message->state = DROPPING;
	loan->frame = NULL;
	s.owes_bell = 0;
	rang_receiver(kucomms_channel_discard(&a, frame, loan->length));
	if (message->state == DROPPING)
		message->state = DISCARDED;
}

static void sleep_for_space(uint32_t length)
{
	int result;

	s.a_sleeps = 0;
	s.a_rung = 0;
	s.a_wants = kucomms_frame_span(length);
	result = kucomms_channel_park_tx(&a, length);
	if (result == -EAGAIN)
		return;
	s.owes_bell = 0;
	rang_receiver(result);
	s.a_sleeps = 1;
}

static void sender_call(const struct operation *operation)
{
	struct loan *loan = &s.loans[operation->x % LOANS];
	uint32_t length = length_of(operation);
	uint64_t number;

	switch (operation->code) {
	case 3:
		ask_for_bell();
		break;
	case 4:
		reserve(loan, length, 0);
		break;
	case 5:
		reserve(loan, length, 1);
		break;
	case 6:
		commit(loan);
		break;
	case 7:
		commit(loan);
		ask_for_bell();
		break;
	case 8:
		discard(loan);
		break;
	case 9:
		unpin_loan(loan);
		break;
	case 10:
	case 11:
		if (length <= LENGTH_MAX)
			sleep_for_space(length);
		break;
	case 12:
		s.a_sleeps = 0;
		kucomms_channel_unpark_tx(&a);
		break;
	case 13:
		number = kucomms_channel_tx_free(&a);
		CHECK(number <= RING_SIZE);
		number = kucomms_channel_tx_avail(&a);
		CHECK(number <= RING_SIZE);
		break;
	default:
		send(operation, length);
		break;
	}
}

/* ---- the receiver --------------------------------------------------------- */

static void check_view(const struct kucomms_view *view,
		       const struct message *message)
{
	uint64_t seed = message->seed;

	CHECK(view->length == message->length);
	CHECK(view->flags == message->flags);
	CHECK(view->type == seed && view->id == ~seed);
	CHECK(view->user_value == seed * 3);
	CHECK(!memcmp(view->data, data_of(seed), view->length));
}

/* The next message, checked, or NULL. */
static struct message *peek(struct kucomms_view *view)
{
	struct message *message;
	unsigned int at = queue_first;
	int must, err;

	while (at != queue_end && queue[at % QUEUE].state == DISCARDED)
		at++;
	must = at != queue_end && queue[at % QUEUE].state == COMMITTED;
	err = kucomms_channel_peek(&b, view);
	CHECK(!err || err == KUCOMMS_SKIPPED || (err == -EAGAIN && !must));
	if (err)
		return NULL;
	for (;; queue_first++) {
		CHECK(queue_first != queue_end);
		message = &queue[queue_first % QUEUE];
		if (message->state == DISCARDED)
			continue;
		if (message->state != DROPPING)
			break;
		message->state = DISCARDED;
	}
	/* A busy one, too, when its sender is gone for good: but not as this. */
	CHECK(message->state == COMMITTED || message->state == PENDING);
	check_view(view, message);
	return message;
}

static int take(struct borrowed *borrowed)
{
	struct kucomms_view view;
	struct message *message = peek(&view);

	if (!message)
		return 0;
	message->state = COMMITTED;
	s.delivered++;
	s.bytes += view.length;
	if (!borrowed || borrowed->pinned) {
		kucomms_channel_advance(&b, &view);
	} else {
		kucomms_channel_borrow(&b, &view, &borrowed->pin);
		borrowed->view = view;
		borrowed->seed = message->seed;
		borrowed->pinned = 1;
		s.pins++;
	}
	queue_first++;
	return 1;
}

static void unpin(struct borrowed *borrowed)
{
	if (!borrowed->pinned)
		return;
	CHECK(!memcmp(borrowed->view.data, data_of(borrowed->seed),
		      borrowed->view.length));
	kucomms_channel_unpin_rx(&borrowed->pin);
	borrowed->pinned = 0;
	s.pins--;
}

static void wake_sender(void)
{
	s.owes_wake = 0;
	rang_sender(kucomms_channel_wake_producer(&b));
}

static void release(void)
{
	uint64_t before = b.rx.published;
	int must_ring = kucomms_channel_release(&b);

	rang_sender(must_ring);
	if (b.rx.published != before)
		s.owes_wake = 0;
}

static void release_lazily(void)
{
	int result = kucomms_channel_release_lazily(&b);

	if (result == -EAGAIN) {
		s.owes_wake = 1;
	} else {
		rang_sender(result);
		if (result)
			s.owes_wake = 0;
	}
}

static void sleep_for_data(void)
{
	release();
	if (s.owes_wake)
		wake_sender();
	s.b_rung = 0;
	if (kucomms_channel_park_rx(&b))
		return;
	s.b_starves = kucomms_channel_peer_starves(&b);
	s.b_sleeps = 1;
}

static void receiver_call(const struct operation *operation)
{
	static struct kucomms_channel *const channels[] = { &b };
	struct borrowed *borrowed = &s.borrowed[operation->x % PINS];
	unsigned int count;
	uint64_t number;

	s.b_sleeps = 0;
	switch (operation->code) {
	case 16:
		take(borrowed);
		break;
	case 17:
	case 18:
		unpin(borrowed);
		break;
	case 19:
		release();
		break;
	case 20:
	case 21:
		release_lazily();
		break;
	case 22:
		wake_sender();
		break;
	case 23:
	case 24:
	case 25:
		sleep_for_data();
		break;
	case 26:
		number = kucomms_channel_rx_avail(&b);
		CHECK(number <= RING_SIZE);
		break;
	case 27:
		kucomms_channels_poll(channels, 1, 0);
		break;
	case 28:
		for (count = operation->x; count && take(NULL); count--)
			;
		release();
		break;
	default:
		take(NULL);
		break;
	}
}

static void perform(const struct operation *operation, int nested)
{
	int side = operation->code < 16 ? SENDER : RECEIVER;

	if (nested && side == s.calling)
		return;
	if (!nested)
		s.calling = side;
	if (side == SENDER)
		sender_call(operation);
	else
		receiver_call(operation);
}

/* The sender closes and is gone: what it committed comes, the rest never. */
static void program_end(void)
{
	struct message *message;
	unsigned int i;

	inside = 1;
	kucomms_channel_close(&a, KUCOMMS_STATE_CLOSED);
	CHECK(kucomms_ring_peer_state(&b.rx) == KUCOMMS_STATE_CLOSED);
	b.rx.final = 1;
	for (i = queue_first; i != queue_end; i++) {
		message = &queue[i % QUEUE];
		if (message->state == BUSY)
			message->state = DISCARDED;
	}
	while (take(NULL))
		;
	for (i = 0; i < PINS; i++)
		unpin(&s.borrowed[i]);
	release();
	CHECK(s.delivered == s.committed);
	CHECK(b.rx.published == a.tx.position);
	/* Only what the sender itself had in use is not free. */
	for (i = 0; i < LOANS; i++) {
		if (s.loans[i].frame)
			kucomms_ring_discard(s.loans[i].frame,
					     s.loans[i].length);
		s.loans[i].frame = NULL;
		unpin_loan(&s.loans[i]);
	}
	CHECK(kucomms_channel_tx_free(&a) == RING_SIZE);
}
