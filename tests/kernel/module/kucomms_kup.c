// SPDX-License-Identifier: GPL-2.0-only
/*
 * An endpoint with numbered channels that plays with whoever has one: it echoes,
 * counts in turn with the user, and sends numbers that have to come back.
 * tests/kernel/test_kup.py is the other half.
 *
 * With KUCOMMS_TURNS in its flags it waits for a token before it begins.
 * tests/kernel/test_turns.py tells it what to try then.
 *
 * The parameters of the module say how many channels there are and what the
 * kernel begins as soon as one is open; what is written to them later announces
 * more, or waits for one. A hello of "refuse" is refused, one of "sleep" waits
 * until the module goes.
 */
#include <linux/atomic.h>
#include <linux/completion.h>
#include <linux/delay.h>
#include <linux/err.h>
#include <linux/hrtimer.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/random.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/workqueue.h>

#include <kucomms/kucomms.h>

/* Types of messages. */
enum {
	KUP_ECHO,	/* send it back */
	KUP_NONCE,	/* a number of ours, on its way */
	KUP_COUNT,	/* the next number, of ROUNDS on each side */
	KUP_STATUS,	/* the numbers of kup_status() */
	KUP_HOLD,	/* keep it; answers where, or an errno */
	KUP_LET_GO,	/* send what is kept at WHERE, and let it go as HOW says */
	KUP_END_WITH,	/* close the channel, with all that is kept */
	KUP_GREETING,	/* from who has waited for the channel */
	KUP_DONE,	/* all our numbers have come back */
	KUP_TURNS,	/* what can be sent with the turn */
	KUP_OTHERS,	/* what could be sent without it, after KUP_TURNS */
	KUP_PASS,	/* pass the turn */
	KUP_AGAIN,	/* take it the second time only, see kup_again() */
	KUP_RACE,	/* send from a callback, a hard interrupt and a thread at once */
	KUP_RACED,	/* how many of them have sent, and how many were out of turn */
	KUP_KEEP,	/* nothing: the turn stays here */
};

/* What the kernel begins with. */
enum { KUP_WAIT, KUP_NONCES, KUP_COUNTS };

/* Where a message is let go. */
enum { KUP_CALLBACK, KUP_HARD, KUP_PROCESS };

#define KUP_ROUNDS	20
#define KUP_KEPT	80	/* more than may be held */

static char *name = KBUILD_MODNAME;
module_param(name, charp, 0400);
MODULE_PARM_DESC(name, "of the device");

static unsigned int channels = 1;
module_param(channels, uint, 0400);
MODULE_PARM_DESC(channels, "how many there are at first");

static unsigned int begin;
module_param(begin, uint, 0400);
MODULE_PARM_DESC(begin, "what the kernel does first: 0 waits, 1 sends nonces, 2 counts");

static unsigned int hops = 1;
module_param(hops, uint, 0400);
MODULE_PARM_DESC(hops, "how often a nonce has to come back");

static unsigned int flags;
module_param(flags, uint, 0400);
MODULE_PARM_DESC(flags, "of the endpoint's options");

static struct kucomms_endpoint *kup_endpoint;
static DECLARE_COMPLETION(kup_going);
static atomic_t kup_opened = ATOMIC_INIT(0);
static atomic_t kup_closed = ATOMIC_INIT(0);

/**
 * struct kup_channel - a channel
 * @channel: the kernel's
 * @nonce: that is on its way
 * @hop: how often it came back
 * @left: nonces still to be sent, with this one
 * @count: the last number that we sent
 * @right: how many numbers came back as they have to
 * @wrong: how many did not
 * @kept: messages that are held
 * @going: what is to be let go elsewhere
 * @hard: lets it go in hard interrupt context
 * @process: in a thread
 * @others: what KUP_OTHERS answers
 * @again: the turn, when KUP_AGAIN was handed out before; -1 when it was not
 * @won: senders of a race
 * @lost: that were out of turn
 * @race_hard: sends in hard interrupt context
 * @race_process: in a thread
 */
struct kup_channel {
	struct kucomms_channel *channel;
	u64 nonce;
	u64 hop;
	u64 left;
	u64 count;
	u64 right;
	u64 wrong;
	struct kucomms_message *kept[KUP_KEPT];
	struct kucomms_message *going;
	struct hrtimer hard;
	struct work_struct process;
	s64 others[8];
	s64 again;
	atomic_t won;
	atomic_t lost;
	struct hrtimer race_hard;
	struct work_struct race_process;
};

static void kup_send(struct kup_channel *kup, u64 type, u64 id, u64 number)
{
	const struct kucomms_message message = {
		.type = type,
		.id = id,
		.length = sizeof(number),
		.data = &number,
	};

	/* Who takes turns with us never fills the ring. */
	if (kucomms_send(kup->channel, &message))
		kup->wrong++;
}

static u64 kup_argument(const struct kucomms_message *message, unsigned int index)
{
	const u64 *arguments = message->data;

	return (index + 1) * sizeof(u64) <= message->length ? arguments[index] : U64_MAX;
}

static void kup_answer(struct kup_channel *kup, const struct kucomms_message *message,
		       const void *data, u32 length)
{
	if (kucomms_reply(kup->channel, message, data, length) == -EAGAIN)
		kucomms_retry(kup->channel);
}

static void kup_echo(struct kup_channel *kup, const struct kucomms_message *message)
{
	if (kucomms_send(kup->channel, message) == -EAGAIN)
		kucomms_retry(kup->channel);
}

/* ---- numbers ------------------------------------------------------------ */

static void kup_send_nonce(struct kup_channel *kup)
{
	if (!kup->hop)
		kup->nonce = get_random_u64();
	kup_send(kup, KUP_NONCE, kup->hop, kup->nonce);
}

static void kup_nonce(struct kup_channel *kup, const struct kucomms_message *message)
{
	bool right = kup->left && message->id == kup->hop &&
		     kup_argument(message, 0) == kup->nonce;

	kup->right += right;
	kup->wrong += !right;
	if (!right)
		return;
	if (++kup->hop == hops) {
		kup->hop = 0;
		kup->left--;
	}
	if (kup->left)
		kup_send_nonce(kup);
	else
		kup_send(kup, KUP_DONE, 0, kup->right);
}

static void kup_count(struct kup_channel *kup, const struct kucomms_message *message)
{
	u64 number = kup_argument(message, 0);

	if (number != kup->count + 1) {
		kup->wrong++;
		return;
	}
	kup->right++;
	kup->count += 2;
	if (kup->count < 2 * KUP_ROUNDS)
		kup_send(kup, KUP_COUNT, 0, kup->count);
	else if (flags & KUCOMMS_TURNS)
		kup->wrong += !!kucomms_pass_turn(kup->channel);
}

static void kup_begin(struct kup_channel *kup)
{
	kup->count = U64_MAX;
	if (begin == KUP_NONCES) {
		kup->left = KUP_ROUNDS;
		kup_send_nonce(kup);
	} else if (begin == KUP_COUNTS) {
		kup->count = 0;
		kup_send(kup, KUP_COUNT, 0, 0);
	}
}

/* ---- messages that are held --------------------------------------------- */

static enum hrtimer_restart kup_hard(struct hrtimer *timer)
{
	struct kup_channel *kup = container_of(timer, struct kup_channel, hard);

	kucomms_let_go(kup->channel, kup->going);
	return HRTIMER_NORESTART;
}

static void kup_process(struct work_struct *work)
{
	struct kup_channel *kup = container_of(work, struct kup_channel, process);

	kucomms_let_go(kup->channel, kup->going);
}

static void kup_hold(struct kup_channel *kup, const struct kucomms_message *message)
{
	struct kucomms_message *held = kucomms_hold(kup->channel, message);
	s64 where = 0;

	if (IS_ERR(held)) {
		where = PTR_ERR(held);
	} else {
		while (where < KUP_KEPT - 1 && kup->kept[where])
			where++;
		kup->kept[where] = held;
	}
	kup_answer(kup, message, &where, sizeof(where));
}

static void kup_let_go(struct kup_channel *kup, const struct kucomms_message *message)
{
	u64 where = min_t(u64, kup_argument(message, 0), KUP_KEPT - 1);
	struct kucomms_message *held = kup->kept[where];

	if (!held || kucomms_reply(kup->channel, message, held->data, held->length)) {
		kup->wrong++;
		return;
	}
	kup->kept[where] = NULL;
	/* The one before this first. */
	if (hrtimer_cancel(&kup->hard))
		kucomms_let_go(kup->channel, kup->going);
	flush_work(&kup->process);
	kup->going = held;
	switch (kup_argument(message, 1)) {
	case KUP_HARD:
		hrtimer_start(&kup->hard, 1000, HRTIMER_MODE_REL_HARD);
		break;
	case KUP_PROCESS:
		queue_work(system_unbound_wq, &kup->process);
		break;
	default:
		kucomms_let_go(kup->channel, held);
	}
}

/* ---- turns -------------------------------------------------------------- */

/* The errno of a message in place that is not to be sent. */
static s64 kup_reserves(struct kup_channel *kup)
{
	struct kucomms_message *loan = kucomms_reserve(kup->channel, 8);

	if (IS_ERR(loan))
		return PTR_ERR(loan);
	kucomms_discard(kup->channel, loan);
	return 0;
}

/* Every way to send, when it is the user's turn. */
static void kup_try_others(struct kup_channel *kup, const struct kucomms_message *message)
{
	struct kucomms_channel *channel = kup->channel;
	s64 *others = kup->others;

	others[0] = kucomms_has_turn(channel);
	others[1] = kucomms_send(channel, message);
	others[2] = kucomms_send_unlocked(channel, message);
	others[3] = kucomms_reply(channel, message, NULL, 0);
	others[4] = kup_reserves(kup);
	others[5] = PTR_ERR_OR_ZERO(kucomms_reserve_unlocked(channel, 8));
	others[6] = kucomms_pass_turn(channel);
	others[7] = kucomms_has_turn(channel);
}

static void kup_turns(struct kup_channel *kup, const struct kucomms_message *message)
{
	struct kucomms_channel *channel = kup->channel;
	struct kucomms_message token = { .flags = KUCOMMS_FLAG_TOKEN, .length = 1, .data = "x" };
	struct kucomms_message *loan;
	s64 answer[9];

	answer[0] = kucomms_has_turn(channel);
	answer[1] = kucomms_send(channel, &token);
	token.length = 0;
	token.flags |= KUCOMMS_FLAG_REPLY;
	answer[2] = kucomms_send(channel, &token);
	loan = kucomms_reserve(channel, 8);
	answer[3] = PTR_ERR_OR_ZERO(loan);
	answer[4] = kucomms_has_turn(channel);
	answer[5] = kup_reserves(kup);
	if (!IS_ERR(loan))
		kucomms_discard(channel, loan);
	answer[6] = kucomms_has_turn(channel);
	/* One that is begun and forgotten. */
	answer[7] = PTR_ERR_OR_ZERO(kucomms_reserve_unlocked(channel, 8));
	answer[8] = kucomms_has_turn(channel);
	kup_answer(kup, message, answer, sizeof(answer));
	kup_try_others(kup, message);
}

/* With an argument it is answered at once, and may not be answered again. */
static void kup_again(struct kup_channel *kup, const struct kucomms_message *message)
{
	s64 turn = kucomms_has_turn(kup->channel), answer[2] = { kup->again, turn };

	if (kup->again < 0) {
		kup->again = turn;
		if (message->length)
			kup_answer(kup, message, answer, sizeof(answer));
		kucomms_retry(kup->channel);
		kucomms_resume(kup->channel);
		return;
	}
	kup->again = -1;
	if (!message->length)
		kup_answer(kup, message, answer, sizeof(answer));
	else
		kup_try_others(kup, message);
}

static void kup_race_send(struct kup_channel *kup)
{
	const struct kucomms_message message = { .type = KUP_RACE };

	switch (kucomms_send(kup->channel, &message)) {
	case 0:
		atomic_inc(&kup->won);
		break;
	case -EPERM:
		atomic_inc(&kup->lost);
	}
}

static enum hrtimer_restart kup_race_hard(struct hrtimer *timer)
{
	kup_race_send(container_of(timer, struct kup_channel, race_hard));
	return HRTIMER_NORESTART;
}

static void kup_race_process(struct work_struct *work)
{
	kup_race_send(container_of(work, struct kup_channel, race_process));
}

static void kup_race(struct kup_channel *kup, const struct kucomms_message *message)
{
	atomic_set(&kup->won, 0);
	atomic_set(&kup->lost, 0);
	hrtimer_start(&kup->race_hard, kup_argument(message, 0), HRTIMER_MODE_REL_HARD);
	queue_work(system_unbound_wq, &kup->race_process);
	ndelay(min_t(u64, kup_argument(message, 1), 10000));
	kup_race_send(kup);
	/* The next callback, with which the turn comes back, is for none of them. */
	flush_work(&kup->race_process);
	while (hrtimer_active(&kup->race_hard))
		usleep_range(10, 100);
}

static void kup_raced(struct kup_channel *kup, const struct kucomms_message *message)
{
	const s64 answer[] = { atomic_read(&kup->won), atomic_read(&kup->lost) };

	kup_answer(kup, message, answer, sizeof(answer));
}

static void kup_token(struct kup_channel *kup, const struct kucomms_message *message)
{
	if (begin)
		kup_begin(kup);
	else
		kup_echo(kup, message);
}

/* ---- callbacks ---------------------------------------------------------- */

static void kup_status(struct kup_channel *kup, const struct kucomms_message *message)
{
	const s64 status[] = {
		kucomms_channel_number(kup->channel),
		kup->right,
		kup->wrong,
		kucomms_rx_avail(kup->channel),
		kucomms_rx_free(kup->channel),
	};

	kup_answer(kup, message, status, sizeof(status));
}

static void kup_message(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	struct kup_channel *kup = kucomms_channel_priv(channel);

	if (message->flags & KUCOMMS_FLAG_TOKEN) {
		kup_token(kup, message);
		return;
	}
	switch (message->type) {
	case KUP_ECHO:
		kup_echo(kup, message);
		break;
	case KUP_NONCE:
		kup_nonce(kup, message);
		break;
	case KUP_COUNT:
		kup_count(kup, message);
		break;
	case KUP_STATUS:
		kup_status(kup, message);
		break;
	case KUP_HOLD:
		kup_hold(kup, message);
		break;
	case KUP_LET_GO:
		kup_let_go(kup, message);
		break;
	case KUP_END_WITH:
		kucomms_close(channel);
		break;
	case KUP_TURNS:
		kup_turns(kup, message);
		break;
	case KUP_OTHERS:
		kup_answer(kup, message, kup->others, sizeof(kup->others));
		break;
	case KUP_PASS:
		kup->wrong += !!kucomms_pass_turn(channel);
		break;
	case KUP_AGAIN:
		kup_again(kup, message);
		break;
	case KUP_RACE:
		kup_race(kup, message);
		break;
	case KUP_RACED:
		kup_raced(kup, message);
	}
}

static int kup_open(struct kucomms_channel *channel, const struct kucomms_peer *peer)
{
	struct kup_channel *kup;

	if (peer->hello_length == 6 && !memcmp(peer->hello, "refuse", 6))
		return -EACCES;
	/* Until the endpoint is being unregistered, but for a moment before that. */
	if (peer->hello_length == 5 && !memcmp(peer->hello, "sleep", 5)) {
		wait_for_completion_timeout(&kup_going, 60 * HZ);
		msleep(300);
	}
	kup = kzalloc(sizeof(*kup), GFP_KERNEL);
	if (!kup)
		return -ENOMEM;
	kup->channel = channel;
	hrtimer_init(&kup->hard, CLOCK_MONOTONIC, HRTIMER_MODE_REL_HARD);
	kup->hard.function = kup_hard;
	INIT_WORK(&kup->process, kup_process);
	kup->again = -1;
	kup->count = U64_MAX;
	hrtimer_init(&kup->race_hard, CLOCK_MONOTONIC, HRTIMER_MODE_REL_HARD);
	kup->race_hard.function = kup_race_hard;
	INIT_WORK(&kup->race_process, kup_race_process);
	kucomms_channel_set_priv(channel, kup);
	atomic_inc(&kup_opened);
	/* With turns the user begins, by passing his. */
	if (!(flags & KUCOMMS_TURNS))
		kup_begin(kup);
	return 0;
}

/* What is still held is read once more, and let go or not. */
static void kup_close(struct kucomms_channel *channel)
{
	struct kup_channel *kup = kucomms_channel_priv(channel);
	int i;

	hrtimer_cancel(&kup->hard);
	flush_work(&kup->process);
	hrtimer_cancel(&kup->race_hard);
	flush_work(&kup->race_process);
	for (i = 0; i < KUP_KEPT; i++) {
		if (!kup->kept[i])
			continue;
		WARN_ON_ONCE(memchr_inv(kup->kept[i]->data, (u8)kup->kept[i]->id,
					kup->kept[i]->length));
		if (i % 2)
			kucomms_let_go(channel, kup->kept[i]);
	}
	kfree(kup);
	atomic_inc(&kup_closed);
}

static const struct kucomms_endpoint_ops kup_ops = {
	.size = sizeof(kup_ops),
	.message = kup_message,
	.open = kup_open,
	.close = kup_close,
};

/* ---- parameters --------------------------------------------------------- */

static int kup_set_announce(const char *value, const struct kernel_param *param)
{
	unsigned int count;
	int err = kstrtouint(value, 0, &count);

	return err ?: kup_endpoint ? kucomms_announce(kup_endpoint, count) : -EAGAIN;
}

/* "NUMBER MILLISECONDS": wait for this channel, and greet who has it. */
static int kup_set_greet(const char *value, const struct kernel_param *param)
{
	u64 number, milliseconds;
	struct kucomms_message greeting = { .type = KUP_GREETING };
	struct kucomms_channel *channel;
	int err;

	if (!kup_endpoint)
		return -EAGAIN;
	if (sscanf(value, "%llu %llu", &number, &milliseconds) != 2)
		return -EINVAL;
	channel = kucomms_wait_channel(kup_endpoint, number, (s64)milliseconds * NSEC_PER_MSEC);
	if (IS_ERR(channel))
		return PTR_ERR(channel);
	greeting.id = kucomms_channel_number(channel);
	err = kucomms_send(channel, &greeting);
	kucomms_channel_put(channel);
	return err;
}

static int kup_get_counts(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%d %d\n", atomic_read(&kup_opened), atomic_read(&kup_closed));
}

static const struct kernel_param_ops kup_announce_ops = { .set = kup_set_announce };
static const struct kernel_param_ops kup_greet_ops = { .set = kup_set_greet };
static const struct kernel_param_ops kup_counts_ops = { .get = kup_get_counts };

module_param_cb(announce, &kup_announce_ops, NULL, 0200);
MODULE_PARM_DESC(announce, "write a number here to have so many channels");
module_param_cb(greet, &kup_greet_ops, NULL, 0200);
MODULE_PARM_DESC(greet, "write a number and milliseconds here to wait for a channel");
module_param_cb(counts, &kup_counts_ops, NULL, 0400);
MODULE_PARM_DESC(counts, "how many channels were opened, and closed");

static int __init kup_init(void)
{
	const struct kucomms_endpoint_options options = {
		.size = sizeof(options),
		.flags = flags,
		.numbered = channels,
	};
	struct kucomms_endpoint *endpoint = kucomms_register(name, &kup_ops, &options, NULL);

	if (IS_ERR(endpoint))
		return PTR_ERR(endpoint);
	kup_endpoint = endpoint;
	return 0;
}

static void __exit kup_exit(void)
{
	complete_all(&kup_going);
	kucomms_unregister(kup_endpoint);
}

module_init(kup_init);
module_exit(kup_exit);

MODULE_LICENSE("GPL");
MODULE_AUTHOR("kucomms");
MODULE_DESCRIPTION("kucomms test module: numbered channels");
MODULE_VERSION("0.1.0");
