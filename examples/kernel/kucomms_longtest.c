// SPDX-License-Identifier: GPL-2.0-only
/*
 * The kernel's side of the longtest: "kucomms longtest kernel://longtest".
 *
 * The user's side, A, sends messages of type 0, this side, B, of type 1. In both
 * the id is the number of the message, counted from 1, and the user_value the
 * CRC-32 of the data. Those of type 1 have the number as their data, 8 bytes
 * little endian, over and over. Whoever gets a message of the other's type sends
 * it back as it is; whoever gets one of its own compares it with what it sent.
 *
 * Each side has at most half a ring of its own messages on the way, so that the
 * echoes of the other's find room. A user who keeps to no such rule is not read
 * from while the echo of one message waits for room.
 *
 * An empty message of type 2 says that no more messages of one's own follow. It
 * is answered with the same.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/crc32.h>
#include <linux/err.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/string.h>

#include <kucomms/kucomms.h>

#define LONGTEST_HELLO	"kucomms longtest 1"

/* Messages of our own that one call of the work handler sends at most. */
#define LONGTEST_BURST	64

/* The most numbers in the data of a message of our own. */
#define LONGTEST_REPEAT	64

enum longtest_type {
	LONGTEST_USER,		/* of the user's side */
	LONGTEST_KERNEL,	/* of ours */
	LONGTEST_END,		/* no more of these follow */
};

/**
 * struct longtest - what we know of a channel
 * @pid: of the user
 * @known: it said that it is a longtest: what it sends can be checked
 * @ending: it sends no more of its own, and we neither
 * @end_due: we have not said so yet
 * @window: bytes of our own messages that may be on the way, there and back
 * @in_flight: bytes of our own messages that are
 * @next_own: number of the next message of our own
 * @next_echo: number of the next echo
 * @next_user: number of the next message of the user
 * @sent: messages sent, by type
 * @received: messages received, by type
 * @add_errors: sends that failed although there was room
 * @compare_errors: messages that are wrong, missing or out of order
 * @shown: sum of the counters when they were printed last
 * @data: of a message of our own
 */
struct longtest {
	pid_t pid;
	bool known;
	bool ending;
	bool end_due;
	u64 window;
	u64 in_flight;
	u64 next_own;
	u64 next_echo;
	u64 next_user;
	u64 sent[2];
	u64 received[2];
	u64 add_errors;
	u64 compare_errors;
	u64 shown;
	__le64 data[LONGTEST_REPEAT];
};

static u32 longtest_crc(const void *data, u32 length)
{
	return ~crc32_le(~0, data, length);
}

/* The data of message @number of our own goes to test->data; returns its length. */
static u32 longtest_fill(struct longtest *test, u64 number)
{
	u32 count = 1 + number % LONGTEST_REPEAT;
	u32 i;

	for (i = 0; i < count; i++)
		test->data[i] = cpu_to_le64(number);
	return count * sizeof(test->data[0]);
}

/* Bytes that message @number of our own takes in a ring. */
static u64 longtest_span(u64 number)
{
	return sizeof(struct kucomms_frame) +
	       (1 + number % LONGTEST_REPEAT) * sizeof(__le64);
}

/* ---- receiving ---------------------------------------------------------- */

/* One of our own has come back. */
static void longtest_check_echo(struct longtest *test,
				const struct kucomms_message *message)
{
	u64 missing = message->id - test->next_echo;
	u32 length;

	test->received[LONGTEST_KERNEL]++;
	if (missing >= test->next_own - test->next_echo) {
		test->compare_errors++;		/* nothing like it is on the way */
		return;
	}
	test->compare_errors += missing;
	while (test->next_echo != message->id)
		test->in_flight -= longtest_span(test->next_echo++);
	length = longtest_fill(test, message->id);
	if (message->length != length || message->flags ||
	    memcmp(message->data, test->data, length) ||
	    message->user_value != longtest_crc(test->data, length))
		test->compare_errors++;
	test->in_flight -= longtest_span(test->next_echo++);
}

/* One of the user's own, to be checked and sent back. */
static void longtest_echo(struct kucomms_channel *channel,
			  const struct kucomms_message *message)
{
	struct longtest *test = kucomms_channel_priv(channel);
	int err = kucomms_send_unlocked(channel, message);

	if (err == -EAGAIN) {
		kucomms_retry(channel);		/* the same again when there is room */
		return;
	}
	if (!err)
		test->sent[LONGTEST_USER]++;
	else if (err != -ESHUTDOWN && err != -EPROTO)
		test->add_errors++;
	test->received[LONGTEST_USER]++;
	if (!test->known)
		return;
	if (message->id != test->next_user || message->flags ||
	    message->user_value != longtest_crc(message->data, message->length))
		test->compare_errors++;
	test->next_user = message->id + 1;
}

static void longtest_message(struct kucomms_channel *channel,
			     const struct kucomms_message *message)
{
	struct longtest *test = kucomms_channel_priv(channel);

	switch (message->type) {
	case LONGTEST_USER:
		longtest_echo(channel, message);
		break;
	case LONGTEST_KERNEL:
		longtest_check_echo(test, message);
		break;
	case LONGTEST_END:
		if (test->known) {
			test->end_due = !test->ending;
			test->ending = true;
			break;
		}
		fallthrough;
	default:
		test->compare_errors++;
	}
}

/* ---- sending ------------------------------------------------------------ */

static bool longtest_send_own(struct kucomms_channel *channel, struct longtest *test)
{
	u64 number = test->next_own;
	struct kucomms_message message = { .type = LONGTEST_KERNEL, .id = number };
	u64 span = longtest_span(number);
	int err;

	if (test->in_flight + span > test->window || kucomms_tx_free(channel) < span)
		return false;
	message.length = longtest_fill(test, number);
	message.user_value = longtest_crc(test->data, message.length);
	message.data = test->data;
	err = kucomms_send_unlocked(channel, &message);
	if (err) {
		if (err != -ESHUTDOWN && err != -EPROTO)
			test->add_errors++;
		return false;
	}
	test->next_own++;
	test->in_flight += span;
	test->sent[LONGTEST_KERNEL]++;
	return true;
}

static bool longtest_work(struct kucomms_channel *channel)
{
	struct longtest *test = kucomms_channel_priv(channel);
	struct kucomms_message end = { .type = LONGTEST_END };
	int count;

	if (test->end_due)
		test->end_due = kucomms_send_unlocked(channel, &end) == -EAGAIN;
	if (test->ending)
		return false;
	for (count = 0; count < LONGTEST_BURST; count++)
		if (!longtest_send_own(channel, test))
			return false;
	return true;
}

/* ---- the life of a channel ---------------------------------------------- */

static void longtest_show(struct kucomms_channel *channel, struct longtest *test)
{
	u64 sum = test->sent[0] + test->sent[1] + test->received[0] +
		  test->received[1] + test->add_errors + test->compare_errors;

	if (sum == test->shown)
		return;
	test->shown = sum;
	pr_info("pid %d: avail_tx1=%llu : add_error_count=%llu : compare_error_count=%llu\n",
		test->pid, kucomms_tx_avail(channel), test->add_errors,
		test->compare_errors);
	pr_info("pid %d: sent_count_0=%llu : sent_count_1=%llu : received_count_0=%llu : received_count_1=%llu\n",
		test->pid, test->sent[0], test->sent[1], test->received[0],
		test->received[1]);
}

static void longtest_timer(struct kucomms_channel *channel, u64 now_ns)
{
	longtest_show(channel, kucomms_channel_priv(channel));
}

static int longtest_open(struct kucomms_channel *channel,
			 const struct kucomms_peer *peer)
{
	struct longtest *test = kzalloc(sizeof(*test), GFP_KERNEL);

	if (!test)
		return -ENOMEM;
	test->pid = peer->pid;
	test->known = peer->hello_length == strlen(LONGTEST_HELLO) &&
		      !memcmp(peer->hello, LONGTEST_HELLO, peer->hello_length);
	/* The ring is empty. What is left over has room for LONGTEST_END. */
	test->window = kucomms_tx_free(channel) / 2 - sizeof(struct kucomms_frame);
	test->next_own = 1;
	test->next_echo = 1;
	test->next_user = 1;
	kucomms_channel_set_priv(channel, test);
	return 0;
}

static void longtest_close(struct kucomms_channel *channel)
{
	struct longtest *test = kucomms_channel_priv(channel);

	if (test->ending)	/* it had read all before it ended */
		test->compare_errors += test->next_own - test->next_echo;
	longtest_show(channel, test);
	kfree(test);
}

static const struct kucomms_endpoint_ops longtest_ops = {
	.size = sizeof(longtest_ops),
	.message = longtest_message,
	.work = longtest_work,
	.timer = longtest_timer,
	.open = longtest_open,
	.close = longtest_close,
};

static const struct kucomms_endpoint_options longtest_options = {
	.size = sizeof(longtest_options),
	.hello_length = sizeof(LONGTEST_HELLO) - 1,
	.hello = (const u8 *)LONGTEST_HELLO,
};

static struct kucomms_endpoint *longtest;

static int __init longtest_init(void)
{
	longtest = kucomms_register("kucomms_longtest", &longtest_ops,
				    &longtest_options, NULL);
	return PTR_ERR_OR_ZERO(longtest);
}

static void __exit longtest_exit(void)
{
	kucomms_unregister(longtest);
}

module_init(longtest_init);
module_exit(longtest_exit);

MODULE_LICENSE("GPL");
MODULE_AUTHOR("kucomms");
MODULE_DESCRIPTION("kucomms longtest: sends, echoes and compares without end");
MODULE_VERSION("0.1.0");
