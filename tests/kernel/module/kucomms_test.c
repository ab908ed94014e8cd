// SPDX-License-Identifier: GPL-2.0-only
/*
 * Exercises the kernel API from inside. The type of a message says what to do
 * with it, its data are the arguments, and most are answered by a reply that is
 * an array of 64-bit numbers; tests/kernel/test_kernel_api.py is the other half.
 *
 *	kucomms_test		one thread, ticks
 *	kucomms_test_threads	KUCOMMS_THREAD_PER_CHANNEL, ticks
 *	kucomms_test_quiet	no ticks
 *	kucomms_test_in_place	KUCOMMS_RX_IN_PLACE, no ticks
 *	kucomms_test_limited	at most two channels, no ticks
 *	kucomms_test_polling	busy_poll_ns, no ticks
 *	kucomms_test_polling_threads	both, and ticks
 *
 * A hello of the form "errno NUMBER" has the open callback return that number.
 */
#include <linux/atomic.h>
#include <linux/bitmap.h>
#include <linux/delay.h>
#include <linux/err.h>
#include <linux/errno.h>
#include <linux/hrtimer.h>
#include <linux/kernel.h>
#include <linux/kprobes.h>
#include <linux/ktime.h>
#include <linux/minmax.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/sched.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/timer.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include <kucomms/kucomms.h>

/* What to do with a message. */
enum {
	TEST_ECHO,		/* send it back */
	TEST_ECHO_UNLOCKED,	/* by kucomms_send_unlocked() */
	TEST_STORM,		/* send COUNT messages from each kind of context, up to LARGEST;
				 * with TRY those of hard interrupts by kucomms_try_send()
				 */
	TEST_LOANS,		/* 64 loans that end in the order of SEED */
	TEST_SIZES,		/* send what cannot fit */
	TEST_FILL,		/* send until the ring is full, LENGTH bytes each */
	TEST_RETRY,		/* take it at the COUNTth time only, see HOW */
	TEST_CLOSE,		/* send COUNT messages, then close */
	TEST_UNREGISTER,	/* what must not be done in a callback */
	TEST_REGISTER,		/* with wrong arguments */
	TEST_KEEP,		/* use the channel beyond its close callback */
	TEST_STATUS,		/* the numbers of test_status() */
	TEST_RESET,		/* forget the ticks so far */
	TEST_SLEEP,		/* in the callback, MILLISECONDS */
	TEST_WORK_TICKS,	/* when they came */
	TEST_TIMER_TICKS,
	TEST_CHECKSUM,		/* is the data stable for MICROSECONDS? */
	TEST_MEET,		/* wait until two callbacks wait at once */
	TEST_ECHO_BEGUN,	/* by kucomms_reserve_unlocked() */
	TEST_UNLOCKED,		/* send COUNT messages as the only sender, in both ways */
	TEST_LEND,		/* reserve LENGTH bytes, and keep them out until the close */
	TEST_COMMITS,		/* what a commit says that comes too late, or twice */
	TEST_BEGIN,		/* kucomms_reserve_unlocked(), LENGTH bytes ... */
	TEST_COMMIT_BEGUN,	/* ... and commit it, in another callback */
	TEST_PROBE,		/* ON: a probe sends where the kernel sends; else end that */
};

/* Types of what comes without having been asked for. */
#define TEST_SENDER	1000	/* and who sends, of a storm */
#define TEST_LOAN	1100
#define TEST_FILLED	1200
#define TEST_ROOM	1201
#define TEST_CLOSING	1300
#define TEST_ALONE	1400
#define TEST_LENT	1500
#define TEST_BEGUN	1600
#define TEST_PROBED	1700

enum { TEST_HARD, TEST_SOFT, TEST_PROCESS, TEST_CALLBACK, TEST_SENDERS };

/* Who calls kucomms_resume() after kucomms_retry(). */
enum { RESUME_AT_ONCE, RESUME_HARD, RESUME_SOFT, RESUME_PROCESS };

#define TEST_LOANS_MAX	64
#define TEST_TICKS	1024
#define TEST_BURST	8
#define TEST_LENGTH	256
#define TEST_PATTERN	(SZ_64K + 256)
#define TEST_POLL	(20 * NSEC_PER_MSEC)
#define TEST_INTERVAL	(200 * NSEC_PER_USEC)
#define TEST_PATIENCE	(60 * HZ)
#define TEST_SPIN	((u64)1000)	/* microseconds */

/**
 * struct test_endpoint - an endpoint
 * @name: of its device
 * @options: of it
 * @quiet: no ticks
 * @tame: for whoever asks for anything at all, see test_is_tame()
 * @endpoint: once it is registered
 * @inside: callbacks that run now
 * @overlaps: that have run at the same time
 */
struct test_endpoint {
	const char *name;
	struct kucomms_endpoint_options options;
	bool quiet;
	bool tame;
	struct kucomms_endpoint *endpoint;
	atomic_t inside;
	atomic_t overlaps;
};

/**
 * struct test_sender - who sends a part of a storm
 * @next: the number of its next message
 * @count: how many there are
 * @error: the first but -EAGAIN
 */
struct test_sender {
	u64 next;
	u64 count;
	int error;
};

/**
 * struct test_channel - a channel
 * @channel: the kernel's
 * @endpoint: its
 * @inside: callbacks that run now
 * @senders: of a storm
 * @largest: of the storm's messages; 0 for small ones
 * @tries: in hard interrupts by kucomms_try_send()
 * @stop: the storm has to end
 * @hard: sends in hard interrupt context
 * @soft: in softirq context
 * @process: in a thread that is not the endpoint's
 * @resume_hard: resumes in hard interrupt context
 * @resume_soft: in softirq context
 * @resume_process: in a thread
 * @handed: how often the message that is retried was handed out
 * @filling: bytes of a message that has found no room
 * @fill_number: of the next message of it
 * @alone: messages that TEST_UNLOCKED has sent
 * @alone_full: how often it had to wait for room
 * @alone_moved: bytes that reserving without sending has taken
 * @lent: a loan that is out
 * @begun: a message that was begun and not committed
 * @kept: this channel outlives its close callback
 * @loans: that outlive it, too
 * @work_count: work callbacks
 * @writable_count: writable callbacks
 * @timer_count: timer callbacks
 * @work_ticks: when they came
 * @timer_ticks: when they came
 */
struct test_channel {
	struct kucomms_channel *channel;
	struct test_endpoint *endpoint;
	atomic_t inside;
	struct test_sender senders[TEST_SENDERS];
	u32 largest;
	bool tries;
	bool stop;
	struct hrtimer hard;
	struct timer_list soft;
	struct work_struct process;
	struct hrtimer resume_hard;
	struct timer_list resume_soft;
	struct delayed_work resume_process;
	u64 handed;
	u32 filling;
	u64 fill_number;
	u64 alone;
	u64 alone_full;
	u64 alone_moved;
	struct kucomms_message *lent;
	struct kucomms_message *begun;
	bool kept;
	struct kucomms_message *loans[2];
	u64 work_count;
	u64 writable_count;
	u64 timer_count;
	u64 work_ticks[TEST_TICKS];
	u64 timer_ticks[TEST_TICKS];
};

/* ---- what outlives a channel -------------------------------------------- */

static struct kucomms_channel *test_kept;
static struct kucomms_message *test_kept_loans[2];
static char test_kept_result[128];
static DECLARE_WAIT_QUEUE_HEAD(test_kept_wait);
static bool test_kept_done;

static void test_use_kept(struct work_struct *unused)
{
	struct kucomms_message message = { .length = 5, .data = "after" };
	struct kucomms_message *loan = kucomms_reserve(test_kept, 8);

	if (!IS_ERR(test_kept_loans[0]))
		kucomms_commit(test_kept, test_kept_loans[0]);
	if (!IS_ERR(test_kept_loans[1]))
		kucomms_discard(test_kept, test_kept_loans[1]);
	scnprintf(test_kept_result, sizeof(test_kept_result),
		  "send %d unlocked %d reply %d reserve %d free %d",
		  kucomms_send(test_kept, &message),
		  kucomms_send_unlocked(test_kept, &message),
		  kucomms_reply(test_kept, &message, "after", 5),
		  PTR_ERR_OR_ZERO(loan),
		  kucomms_tx_avail(test_kept) + kucomms_tx_free(test_kept) ==
		  kucomms_rx_avail(test_kept) + kucomms_rx_free(test_kept));
	/* Which mean nothing any more, and do no harm. */
	kucomms_retry(test_kept);
	kucomms_resume(test_kept);
	kucomms_close(test_kept);
	kucomms_channel_put(test_kept);
	test_kept = NULL;
	WRITE_ONCE(test_kept_done, true);
	wake_up_all(&test_kept_wait);
}

static DECLARE_DELAYED_WORK(test_kept_work, test_use_kept);

/* ---- a storm ------------------------------------------------------------ */

static u8 test_pattern[TEST_PATTERN];	/* what large messages are parts of */

/* Sizes up to which the kernel copies in another way than above. */
static u32 test_size(struct test_channel *test, u64 number)
{
	switch (number % 3) {
	case 0:
		return 2048;
	case 1:
		return 2049;
	default:
		return test->largest;
	}
}

static bool test_goes_on(struct test_channel *test, struct test_sender *sender)
{
	return sender->next < sender->count && !sender->error && !READ_ONCE(test->stop);
}

/* Send the next message of a sender; whether it has gone. */
static bool test_send_next(struct test_channel *test, int who, bool unlocked)
{
	struct test_sender *sender = &test->senders[who];
	u8 data[TEST_LENGTH];
	struct kucomms_message message = {
		.type = TEST_SENDER + who,
		.id = sender->next,
		.length = (sender->next * 7 + who) % TEST_LENGTH,
		.data = data,
	};
	int err;

	memset(data, sender->next + 64 * who, message.length);
	if (test->largest) {
		message.length = test_size(test, sender->next + who);
		message.data = test_pattern + (sender->next * 7 + who) % 256;
	}
	if (unlocked)
		err = kucomms_send_unlocked(test->channel, &message);
	else if (test->tries && who == TEST_HARD)
		err = kucomms_try_send(test->channel, &message);
	else
		err = kucomms_send(test->channel, &message);
	if (!err)
		sender->next++;
	else if (err != -EAGAIN && err != -EBUSY)
		sender->error = err;
	return !err;
}

/* Whether there is more to be sent, later. */
static bool test_send_burst(struct test_channel *test, int who)
{
	int count;

	for (count = 0; count < TEST_BURST; count++)
		if (!test_goes_on(test, &test->senders[who]) ||
		    !test_send_next(test, who, false))
			break;
	return test_goes_on(test, &test->senders[who]);
}

static enum hrtimer_restart test_send_hard(struct hrtimer *timer)
{
	struct test_channel *test = container_of(timer, struct test_channel, hard);

	if (WARN_ON_ONCE(!in_hardirq()) || !test_send_burst(test, TEST_HARD))
		return HRTIMER_NORESTART;
	hrtimer_forward_now(timer, ns_to_ktime(TEST_INTERVAL));
	return HRTIMER_RESTART;
}

static void test_send_soft(struct timer_list *timer)
{
	struct test_channel *test = from_timer(test, timer, soft);

	if (!WARN_ON_ONCE(!in_serving_softirq()) && test_send_burst(test, TEST_SOFT))
		mod_timer(timer, jiffies + 1);
}

static void test_send_process(struct work_struct *work)
{
	struct test_channel *test = container_of(work, struct test_channel, process);

	u64 before;

	/* Without a pause, so that it meets the others; but for who makes room. */
	do {
		before = test->senders[TEST_PROCESS].next;
		if (!test_send_burst(test, TEST_PROCESS))
			return;
		if (test->senders[TEST_PROCESS].next == before)
			usleep_range(100, 1000);
		cond_resched();
	} while (true);
}

static void test_begin_storm(struct test_channel *test, u64 count, u32 largest, bool tries)
{
	unsigned int here = get_cpu(), other = cpumask_any_but(cpu_online_mask, here);
	int who;

	test->largest = min_t(u32, largest, SZ_64K);
	test->tries = tries;
	for (who = 0; who < TEST_SENDERS; who++)
		test->senders[who] = (struct test_sender){ .count = count };
	hrtimer_start(&test->hard, ns_to_ktime(TEST_INTERVAL), HRTIMER_MODE_REL_PINNED_HARD);
	mod_timer(&test->soft, jiffies + 1);
	/* On another processor, where the interrupts do not keep it out. */
	queue_work_on(other < nr_cpu_ids ? other : here, system_wq, &test->process);
	put_cpu();
	/* Those of the callback are sent by the work callback. */
}

/* ---- resuming from elsewhere -------------------------------------------- */

static enum hrtimer_restart test_resume_hard(struct hrtimer *timer)
{
	struct test_channel *test = container_of(timer, struct test_channel, resume_hard);

	kucomms_resume(test->channel);
	return HRTIMER_NORESTART;
}

static void test_resume_soft(struct timer_list *timer)
{
	struct test_channel *test = from_timer(test, timer, resume_soft);

	kucomms_resume(test->channel);
}

static void test_resume_process(struct work_struct *work)
{
	struct test_channel *test =
		container_of(to_delayed_work(work), struct test_channel, resume_process);

	kucomms_resume(test->channel);
}

static void test_resume(struct test_channel *test, u64 how, u64 nanoseconds)
{
	switch (how) {
	case RESUME_AT_ONCE:
		kucomms_resume(test->channel);
		break;
	case RESUME_HARD:
		hrtimer_start(&test->resume_hard, ns_to_ktime(nanoseconds),
			      HRTIMER_MODE_REL_HARD);
		break;
	case RESUME_SOFT:
		mod_timer(&test->resume_soft, jiffies + 1);
		break;
	default:
		queue_delayed_work(system_unbound_wq, &test->resume_process,
				   nsecs_to_jiffies(nanoseconds));
	}
}

/* ---- what messages ask for ---------------------------------------------- */

/* Read once, for in the ring the user may change it meanwhile. */
static u64 test_argument(const struct kucomms_message *message, unsigned int index)
{
	const u64 *words = message->data;

	return (index + 1) * sizeof(u64) <= message->length ? READ_ONCE(words[index]) : 0;
}

static void test_answer(struct kucomms_channel *channel, const struct kucomms_message *message,
			const void *data, u32 length)
{
	if (kucomms_reply(channel, message, data, length) == -EAGAIN)
		kucomms_retry(channel);
}

static void test_answer_number(struct kucomms_channel *channel,
			       const struct kucomms_message *message, s64 number)
{
	test_answer(channel, message, &number, sizeof(number));
}

/* As kucomms_send_unlocked(), in two steps. */
static int test_send_begun(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	struct kucomms_message *begun = kucomms_reserve_unlocked(channel, message->length);

	if (IS_ERR(begun))
		return PTR_ERR(begun);
	begun->type = message->type;
	begun->id = message->id;
	begun->user_value = message->user_value;
	begun->flags = message->flags;
	memcpy(begun->data, message->data, message->length);
	kucomms_commit_unlocked(channel, begun);
	return 0;
}

static void test_echo(struct kucomms_channel *channel, const struct kucomms_message *message,
		      u64 how)
{
	int err;

	if (how == TEST_ECHO_UNLOCKED)
		err = kucomms_send_unlocked(channel, message);
	else if (how == TEST_ECHO_BEGUN)
		err = test_send_begun(channel, message);
	else
		err = kucomms_send(channel, message);
	if (err == -EAGAIN)
		kucomms_retry(channel);
}

/* Begin a message, write nonsense, and forget it. */
static void test_forget(struct kucomms_channel *channel, u64 number)
{
	struct test_channel *test = kucomms_channel_priv(channel);
	u64 before = kucomms_tx_avail(channel);
	struct kucomms_message *begun = kucomms_reserve_unlocked(channel, number * 29 % 512);

	if (IS_ERR(begun))
		return;
	begun->type = U64_MAX;
	memset(begun->data, 0xff, begun->length);
	test->alone_moved += max(kucomms_tx_avail(channel), before) - before;
}

/*
 * Messages in turns by kucomms_reserve_unlocked() and kucomms_send_unlocked(),
 * with some forgotten ones between them. Answers: how many were sent, whether it
 * had to wait for room, what forgetting has taken, the errno of two too large.
 */
static void test_unlocked(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	struct test_channel *test = kucomms_channel_priv(channel);
	u64 size = kucomms_tx_avail(channel) + kucomms_tx_free(channel);
	u64 count = test_argument(message, 0), answer[5];
	u8 data[TEST_LENGTH];
	struct kucomms_message next = { .type = TEST_ALONE, .data = data };
	int err;

	for (; test->alone < count; test->alone++) {
		next.id = test->alone;
		next.user_value = ~test->alone;
		next.length = test->alone * 13 % TEST_LENGTH;
		memset(data, test->alone, next.length);
		if (test->alone % 3 == 1)
			test_forget(channel, test->alone);
		err = test->alone % 4 == 3 ? kucomms_send_unlocked(channel, &next) :
					     test_send_begun(channel, &next);
		if (err == -EAGAIN) {
			test->alone_full++;
			kucomms_retry(channel);
			return;
		}
		if (err)
			break;
	}
	answer[0] = test->alone;
	answer[1] = test->alone_full;
	answer[2] = test->alone_moved;
	answer[3] = PTR_ERR_OR_ZERO(kucomms_reserve_unlocked(channel, size - 31));
	answer[4] = PTR_ERR_OR_ZERO(kucomms_reserve_unlocked(channel, U32_MAX));
	test_answer(channel, message, answer, sizeof(answer));
}

static u32 test_random(u64 *state)
{
	*state = *state * 6364136223846793005ULL + 1442695040888963407ULL;
	return *state >> 33;
}

/* All loans at once, ended in random order. Answers: the errno of one more, which were sent. */
static void test_loans(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	struct kucomms_message *loans[TEST_LOANS_MAX], *surplus;
	u64 seed = test_argument(message, 0), answer[4] = {};
	u32 i, length;

	for (i = 0; i < TEST_LOANS_MAX; i++) {
		length = test_random(&seed) % TEST_LENGTH;
		loans[i] = kucomms_reserve(channel, length);
		if (IS_ERR(loans[i])) {
			answer[2] = PTR_ERR(loans[i]);
			break;
		}
		loans[i]->type = TEST_LOAN;
		loans[i]->id = i;
		loans[i]->user_value = length;
		memset(loans[i]->data, i + length, length);
	}
	surplus = kucomms_reserve(channel, 0);
	answer[0] = PTR_ERR_OR_ZERO(surplus);
	/* What was refused has taken nothing away, and one that goes makes room for one. */
	answer[3] = kucomms_tx_avail(channel);
	for (; i > 0; i--) {
		u32 chosen = test_random(&seed) % i;
		struct kucomms_message *loan = loans[chosen];

		loans[chosen] = loans[i - 1];
		if (test_random(&seed) % 3) {
			answer[1] |= BIT_ULL(loan->id);
			kucomms_commit(channel, loan);
		} else {
			kucomms_discard(channel, loan);
		}
	}
	if (!IS_ERR(surplus))
		kucomms_discard(channel, surplus);
	test_answer(channel, message, answer, sizeof(answer));
}

static char test_lent_result[64];
static unsigned long test_long_sent;

/* A loan that stays out, whatever comes. Answers: its errno, and where it is. */
static void test_lend(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	struct test_channel *test = kucomms_channel_priv(channel);
	s64 answer[2] = { -EALREADY, kucomms_tx_avail(channel) };

	if (!test->lent) {
		test->lent = kucomms_reserve(channel, min_t(u64, test_argument(message, 0),
							    TEST_LENGTH));
		answer[0] = PTR_ERR_OR_ZERO(test->lent);
		if (answer[0])
			test->lent = NULL;
	}
	if (test->lent) {
		test->lent->type = TEST_LENT;
		memset(test->lent->data, 0xa5, test->lent->length);
	}
	/* Behind the loan: the user finds it when that is committed. */
	test_answer(channel, message, answer, sizeof(answer));
}

/* In the end: is it what was written there, and what does the commit say? */
static void test_end_lent(struct test_channel *test)
{
	const u8 *data = test->lent->data;
	u32 i, differ = 0;
	int first, again;

	for (i = 0; i < test->lent->length; i++)
		differ += READ_ONCE(data[i]) != 0xa5;
	first = kucomms_commit(test->channel, test->lent);
	again = kucomms_commit(test->channel, test->lent);
	scnprintf(test_lent_result, sizeof(test_lent_result), "differ %u commit %d again %d",
		  differ, first, again);
}

/* Answers: what each commit and discard said. */
static void test_commits(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	struct kucomms_message between = { .type = TEST_ALONE, .id = 1 };
	struct kucomms_message *begun, *loan;
	s64 answer[8];

	begun = kucomms_reserve_unlocked(channel, 8);
	if (IS_ERR(begun))
		return;
	answer[0] = kucomms_send_unlocked(channel, &between);
	answer[1] = kucomms_commit_unlocked(channel, begun);	/* not the next one any more */
	begun = kucomms_reserve_unlocked(channel, 0);
	if (IS_ERR(begun))
		return;
	begun->type = TEST_ALONE;
	begun->id = 2;
	answer[2] = kucomms_commit_unlocked(channel, begun);
	answer[3] = kucomms_commit_unlocked(channel, begun);	/* twice */
	loan = kucomms_reserve(channel, 0);
	if (IS_ERR(loan))
		return;
	loan->type = TEST_ALONE;
	loan->id = 3;
	answer[4] = kucomms_commit(channel, loan);
	answer[5] = kucomms_commit(channel, loan);
	answer[6] = kucomms_discard(channel, loan);
	loan = kucomms_reserve(channel, 0);
	if (IS_ERR(loan))
		return;
	kucomms_discard(channel, loan);
	answer[7] = kucomms_discard(channel, loan);
	test_answer(channel, message, answer, sizeof(answer));
}

/* Nothing is sent: what is begun is nobody's before it is committed. */
static void test_begin(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	struct test_channel *test = kucomms_channel_priv(channel);
	struct kucomms_message *begun =
		kucomms_reserve_unlocked(channel, min_t(u64, test_argument(message, 0),
							TEST_LENGTH));

	test->begun = NULL;
	if (IS_ERR(begun))
		return;
	begun->type = TEST_BEGUN;
	memset(begun->data, 0x5a, begun->length);
	test->begun = begun;
}

static void test_commit_begun(struct kucomms_channel *channel,
			      const struct kucomms_message *message)
{
	struct test_channel *test = kucomms_channel_priv(channel);
	s64 result = -ENOENT;

	if (test->begun)
		result = kucomms_commit_unlocked(channel, test->begun);
	test->begun = NULL;
	test_answer_number(channel, message, result);
}

/* ---- a probe of what runs under the channel's lock ----------------------- */

static atomic_t test_probe_sent, test_probe_busy, test_probe_failed;

#ifdef CONFIG_KPROBES
static struct kucomms_channel *test_probed_channel;

static int test_probed(struct kprobe *probe, struct pt_regs *registers)
{
	struct kucomms_message message = { .type = TEST_PROBED };
	int err = kucomms_try_send(test_probed_channel, &message);

	if (!err)
		atomic_inc(&test_probe_sent);
	else if (err == -EBUSY)
		atomic_inc(&test_probe_busy);
	else if (err != -EAGAIN)
		atomic_inc(&test_probe_failed);
	return 0;
}

/* Each send calls it with the lock, and the runner without. */
static struct kprobe test_kprobe;

static int test_begin_probe(struct kucomms_channel *channel)
{
	if (test_probed_channel)
		return -EBUSY;
	atomic_set(&test_probe_sent, 0);
	atomic_set(&test_probe_busy, 0);
	atomic_set(&test_probe_failed, 0);
	test_probed_channel = channel;
	test_kprobe = (struct kprobe) {
		.symbol_name = "kucomms_owes",
		.pre_handler = test_probed,
	};
	return register_kprobe(&test_kprobe);
}

static void test_end_probe(struct kucomms_channel *channel)
{
	if (test_probed_channel != channel)
		return;
	unregister_kprobe(&test_kprobe);
	test_probed_channel = NULL;
}
#else
static int test_begin_probe(struct kucomms_channel *channel)
{
	return -EOPNOTSUPP;
}

static void test_end_probe(struct kucomms_channel *channel)
{
}
#endif

/* Answers: the errno, and how often the probe has sent, has not, and has failed. */
static void test_probe(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	s64 answer[4] = {};

	if (test_argument(message, 0))
		answer[0] = test_begin_probe(channel);
	else
		test_end_probe(channel);
	answer[1] = atomic_read(&test_probe_sent);
	answer[2] = atomic_read(&test_probe_busy);
	answer[3] = atomic_read(&test_probe_failed);
	test_answer(channel, message, answer, sizeof(answer));
}

static void test_sizes(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	u64 size = kucomms_tx_avail(channel) + kucomms_tx_free(channel);
	struct kucomms_message large = {
		.length = size - sizeof(struct kucomms_frame) + 1,
		.data = message->data,
	};
	u64 before = kucomms_tx_avail(channel), answer[8];

	answer[0] = kucomms_send(channel, &large);
	answer[1] = kucomms_send_unlocked(channel, &large);
	answer[2] = kucomms_reply(channel, message, message->data, large.length);
	answer[3] = PTR_ERR_OR_ZERO(kucomms_reserve(channel, large.length));
	large.length = U32_MAX;
	answer[4] = kucomms_send(channel, &large);
	answer[5] = PTR_ERR_OR_ZERO(kucomms_reserve(channel, U32_MAX));
	answer[6] = kucomms_tx_avail(channel) - before;
	answer[7] = size;
	test_answer(channel, message, answer, sizeof(answer));
}

/* Send until there is no room: -EAGAIN, or what else has happened. */
static int test_fill(struct kucomms_channel *channel, u64 type)
{
	struct test_channel *test = kucomms_channel_priv(channel);
	u8 data[TEST_LENGTH] = {};
	struct kucomms_message filler = {
		.type = type,
		.length = min_t(u32, test->filling, TEST_LENGTH),
		.data = data,
	};
	int err;

	do {
		filler.id = test->fill_number;
		err = kucomms_send(channel, &filler);
		if (!err)
			test->fill_number++;
	} while (!err && type == TEST_FILLED);
	return err;
}

static void test_retry(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	struct test_channel *test = kucomms_channel_priv(channel);
	u64 count = test_argument(message, 0), how = test_argument(message, 1);
	struct kucomms_message answer = {
		.type = TEST_RETRY,
		.id = message->id,
		.length = sizeof(test->handed),
	};

	if (++test->handed < count) {
		kucomms_retry(channel);
		test_resume(test, how, test_argument(message, 2));
		/* So that who resumes has come first, if that is wanted. */
		if (test_argument(message, 3))
			msleep(test_argument(message, 3));
		return;
	}
	answer.data = &test->handed;
	if (kucomms_send(channel, &answer) == -EAGAIN)
		kucomms_retry(channel);
	else
		test->handed = 0;
}

static void test_close_channel(struct kucomms_channel *channel,
			       const struct kucomms_message *message)
{
	struct kucomms_message last = { .type = TEST_CLOSING };
	u64 count = test_argument(message, 0);

	while (last.id < count && !kucomms_send(channel, &last))
		last.id++;
	kucomms_close(channel);
}

static void test_keep(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	struct test_channel *test = kucomms_channel_priv(channel);
	int i;

	test->kept = true;
	test_kept = kucomms_channel_get(channel);
	WRITE_ONCE(test_kept_done, false);
	test_answer_number(channel, message, 0);
	for (i = 0; i < ARRAY_SIZE(test->loans); i++)
		test->loans[i] = kucomms_reserve(channel, 8);
}

static void test_status(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	struct test_channel *test = kucomms_channel_priv(channel);
	u64 answer[] = {
		kucomms_tx_avail(channel),
		kucomms_tx_free(channel),
		kucomms_rx_avail(channel),
		kucomms_rx_free(channel),
		task_pid_nr(current),
		atomic_read(&test->endpoint->overlaps),
		test->work_count,
		test->timer_count,
		test->senders[TEST_HARD].error,
		test->senders[TEST_SOFT].error,
		test->senders[TEST_PROCESS].error,
		test->senders[TEST_CALLBACK].error,
		test->fill_number,
		IS_ALIGNED((unsigned long)message->data, 8),
		test->writable_count,
	};

	test_answer(channel, message, answer, sizeof(answer));
}

static atomic_t test_checksums = ATOMIC_INIT(0);
static atomic_t test_differences = ATOMIC_INIT(0);

static u64 test_sum(const struct kucomms_message *message)
{
	const u8 *data = message->data;
	u64 sum = 0;
	u32 i;

	for (i = 0; i < message->length; i++)
		sum = sum * 31 + READ_ONCE(data[i]);
	return sum;
}

/* Counts messages, and those that were another a moment later. */
static void test_checksum(const struct kucomms_message *message)
{
	struct kucomms_message before = *message;
	u64 sum = test_sum(message), until;

	/* A hostile user may have written any number there. */
	until = ktime_get_ns() + min(message->user_value, TEST_SPIN) * NSEC_PER_USEC;
	while (ktime_get_ns() < until)
		cpu_relax();
	if (sum != test_sum(message) || memcmp(&before, message, sizeof(before)))
		atomic_inc(&test_differences);
	atomic_inc(&test_checksums);
}

static atomic_t test_met = ATOMIC_INIT(0);
static DECLARE_WAIT_QUEUE_HEAD(test_meeting);

static void test_meet(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	atomic_inc(&test_met);
	wake_up_all(&test_meeting);
	wait_event_timeout(test_meeting, atomic_read(&test_met) % 2 == 0, TEST_PATIENCE);
	test_answer_number(channel, message, atomic_read(&test_met) % 2 == 0);
}

static void test_register(struct kucomms_channel *channel, const struct kucomms_message *message);

/* What takes no time, and cannot be asked for wrongly. */
static bool test_is_tame(struct test_channel *test, u64 type)
{
	switch (type) {
	case TEST_STORM:	/* One, since its senders run while the next would begin. */
		return !test->senders[TEST_HARD].count;
	case TEST_LOANS:
	case TEST_SIZES:
	case TEST_FILL:
	case TEST_CLOSE:
	case TEST_UNREGISTER:
	case TEST_STATUS:
	case TEST_RESET:
	case TEST_WORK_TICKS:
	case TEST_TIMER_TICKS:
	case TEST_CHECKSUM:
		return true;
	default:
		return false;
	}
}

static void test_do(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	struct test_channel *test = kucomms_channel_priv(channel);
	u64 first = test_argument(message, 0), what = message->type;

	if (test->endpoint->tame && !test_is_tame(test, what))
		what = TEST_ECHO;
	switch (what) {
	case TEST_STORM:
		test_begin_storm(test, first, test_argument(message, 1),
				 test_argument(message, 2));
		break;
	case TEST_LOANS:
		test_loans(channel, message);
		break;
	case TEST_SIZES:
		test_sizes(channel, message);
		break;
	case TEST_FILL:
		test->filling = first;
		test_fill(channel, TEST_FILLED);
		break;
	case TEST_RETRY:
		test_retry(channel, message);
		break;
	case TEST_CLOSE:
		test_close_channel(channel, message);
		break;
	case TEST_UNREGISTER:
		test_answer_number(channel, message,
				   kucomms_unregister(kucomms_channel_endpoint(channel)));
		break;
	case TEST_REGISTER:
		test_register(channel, message);
		break;
	case TEST_KEEP:
		test_keep(channel, message);
		break;
	case TEST_STATUS:
		test_status(channel, message);
		break;
	case TEST_RESET:
		test->work_count = 0;
		test->timer_count = 0;
		test_answer_number(channel, message, ktime_get_ns());
		break;
	case TEST_SLEEP:
		msleep(first);
		test_answer_number(channel, message, ktime_get_ns());
		break;
	case TEST_WORK_TICKS:
		test_answer(channel, message, test->work_ticks,
			    min_t(u64, test->work_count, TEST_TICKS) * sizeof(u64));
		break;
	case TEST_TIMER_TICKS:
		test_answer(channel, message, test->timer_ticks,
			    min_t(u64, test->timer_count, TEST_TICKS) * sizeof(u64));
		break;
	case TEST_CHECKSUM:
		test_checksum(message);
		break;
	case TEST_MEET:
		test_meet(channel, message);
		break;
	case TEST_UNLOCKED:
		test_unlocked(channel, message);
		break;
	case TEST_LEND:
		test_lend(channel, message);
		break;
	case TEST_COMMITS:
		test_commits(channel, message);
		break;
	case TEST_BEGIN:
		test_begin(channel, message);
		break;
	case TEST_PROBE:
		test_probe(channel, message);
		break;
	case TEST_COMMIT_BEGUN:
		test_commit_begun(channel, message);
		break;
	default:
		test_echo(channel, message, what);
	}
}

/* ---- callbacks ---------------------------------------------------------- */

static void test_enter(struct test_channel *test)
{
	bool threads = test->endpoint->options.flags & KUCOMMS_THREAD_PER_CHANNEL;
	atomic_t *inside = threads ? &test->inside : &test->endpoint->inside;

	if (atomic_inc_return(inside) != 1)
		atomic_inc(&test->endpoint->overlaps);
}

static void test_leave(struct test_channel *test)
{
	bool threads = test->endpoint->options.flags & KUCOMMS_THREAD_PER_CHANNEL;

	atomic_dec(threads ? &test->inside : &test->endpoint->inside);
}

static void test_message(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	struct test_channel *test = kucomms_channel_priv(channel);

	test_enter(test);
	test_do(channel, message);
	test_leave(test);
}

static bool test_work(struct kucomms_channel *channel)
{
	struct test_channel *test = kucomms_channel_priv(channel);

	test_enter(test);
	test->work_ticks[test->work_count++ % TEST_TICKS] = ktime_get_ns();
	test_send_burst(test, TEST_CALLBACK);
	test_leave(test);
	return false;
}

static void test_writable(struct kucomms_channel *channel)
{
	struct test_channel *test = kucomms_channel_priv(channel);

	test_enter(test);
	test->writable_count++;
	if (test->filling && !test_fill(channel, TEST_ROOM))
		test->filling = 0;
	test_leave(test);
}

static void test_timer(struct kucomms_channel *channel, u64 now_ns)
{
	struct test_channel *test = kucomms_channel_priv(channel);

	test_enter(test);
	test->timer_ticks[test->timer_count++ % TEST_TICKS] = now_ns;
	test_leave(test);
}

static int test_open(struct kucomms_channel *channel, const struct kucomms_peer *peer)
{
	struct test_channel *test;
	char hello[KUCOMMS_HELLO_MAX + 1] = {};
	int err;

	memcpy(hello, peer->hello, peer->hello_length);
	if (sscanf(hello, "errno %d", &err) == 1)
		return err;
	test = kzalloc(sizeof(*test), GFP_KERNEL);
	if (!test)
		return -ENOMEM;
	test->channel = channel;
	test->endpoint = kucomms_priv(kucomms_channel_endpoint(channel));
	hrtimer_init(&test->hard, CLOCK_MONOTONIC, HRTIMER_MODE_REL_HARD);
	test->hard.function = test_send_hard;
	timer_setup(&test->soft, test_send_soft, 0);
	INIT_WORK(&test->process, test_send_process);
	hrtimer_init(&test->resume_hard, CLOCK_MONOTONIC, HRTIMER_MODE_REL_HARD);
	test->resume_hard.function = test_resume_hard;
	timer_setup(&test->resume_soft, test_resume_soft, 0);
	INIT_DELAYED_WORK(&test->resume_process, test_resume_process);
	kucomms_channel_set_priv(channel, test);
	return 0;
}

static void test_close(struct kucomms_channel *channel)
{
	struct test_channel *test = kucomms_channel_priv(channel);

	test_enter(test);
	test_end_probe(channel);
	if (test->lent)
		test_end_lent(test);
	WRITE_ONCE(test->stop, true);
	hrtimer_cancel(&test->hard);
	del_timer_sync(&test->soft);
	cancel_work_sync(&test->process);
	if (test->largest)
		WRITE_ONCE(test_long_sent, test->senders[TEST_PROCESS].next);
	hrtimer_cancel(&test->resume_hard);
	del_timer_sync(&test->resume_soft);
	cancel_delayed_work_sync(&test->resume_process);
	if (test->kept) {
		memcpy(test_kept_loans, test->loans, sizeof(test->loans));
		queue_delayed_work(system_wq, &test_kept_work, HZ / 20);
	}
	test_leave(test);
	kfree(test);
}

static const struct kucomms_endpoint_ops test_ops = {
	.size = sizeof(test_ops),
	.message = test_message,
	.work = test_work,
	.writable = test_writable,
	.timer = test_timer,
	.open = test_open,
	.close = test_close,
};

static const struct kucomms_endpoint_ops test_quiet_ops = {
	.size = sizeof(test_quiet_ops),
	.message = test_message,
	.writable = test_writable,
	.open = test_open,
	.close = test_close,
};

/* ---- endpoints ---------------------------------------------------------- */

static struct test_endpoint test_endpoints[] = {
	{
		.name = "kucomms_test",
	}, {
		.name = "kucomms_test_threads",
		.options.flags = KUCOMMS_THREAD_PER_CHANNEL,
	}, {
		.name = "kucomms_test_quiet",
		.quiet = true,
	}, {
		.name = "kucomms_test_in_place",
		.options.flags = KUCOMMS_RX_IN_PLACE,
		.quiet = true,
	}, {
		.name = "kucomms_test_limited",
		.options.max_channels = 2,
		.options.ring_size = 5000,
		.options.max_ring_size = 10000,
		.options.hello_length = 7,
		.options.hello = "limited",
		.quiet = true,
	}, {
		.name = "kucomms_test_polling",
		.options.busy_poll_ns = TEST_POLL,
		.quiet = true,
	}, {
		.name = "kucomms_test_polling_threads",
		.options.flags = KUCOMMS_THREAD_PER_CHANNEL,
		.options.busy_poll_ns = TEST_POLL,
	}, {
		.name = "kucomms_test_tame",
		.tame = true,
	}, {
		.name = "kucomms_test_tame_threads",
		.options.flags = KUCOMMS_THREAD_PER_CHANNEL,
		.tame = true,
	}, {
		.name = "kucomms_test_tame_in_place",
		.options.flags = KUCOMMS_RX_IN_PLACE,
		.quiet = true,
		.tame = true,
	},
};

static struct test_endpoint *test_find(const char *name)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(test_endpoints); i++)
		if (sysfs_streq(name, test_endpoints[i].name))
			return &test_endpoints[i];
	return NULL;
}

/* The errno of kucomms_register(); what it has made goes again. */
static s64 test_try(const char *name, const struct kucomms_endpoint_ops *ops,
		    const struct kucomms_endpoint_options *options)
{
	struct kucomms_endpoint *endpoint = kucomms_register(name, ops, options, NULL);

	return IS_ERR(endpoint) ? PTR_ERR(endpoint) : kucomms_unregister(endpoint);
}

static void test_register(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	static const char * const names[] = {
		"", "t", "kucomms", "kucomms_", "kucomm_test", "kucomms_a/b", "kucomms_a.b",
		"kucomms_a\nb", "kucomms_a ", "kucomms_\xc3\xa9", "/kucomms_a",
	};
	struct kucomms_endpoint_options options = { .size = sizeof(options) };
	struct {
		struct kucomms_endpoint_options known;
		u64 newer;
	} larger = { .known.size = sizeof(larger), .newer = 1 };
	struct kucomms_endpoint_ops ops = test_quiet_ops;
	char name[] = "kucomms_1234567890123456789012345678901234567890123456789";
	s64 answer[ARRAY_SIZE(names) + 17];
	int count = 0, i;

	for (i = 0; i < ARRAY_SIZE(names); i++)
		answer[count++] = test_try(names[i], &ops, NULL);
	answer[count++] = test_try("kucomms_other", NULL, NULL);
	ops.size--;
	answer[count++] = test_try("kucomms_other", &ops, NULL);
	ops.size = 0;
	answer[count++] = test_try("kucomms_other", &ops, NULL);
	ops = test_quiet_ops;
	ops.message = NULL;
	answer[count++] = test_try("kucomms_other", &ops, NULL);
	answer[count++] = test_try("kucomms_other", &test_quiet_ops, &larger.known);
	options.flags = 0x20;
	answer[count++] = test_try("kucomms_other", &test_quiet_ops, &options);
	options.flags = 0;
	options.numbered = KUCOMMS_NUMBERED_MAX + 1;
	answer[count++] = test_try("kucomms_other", &test_quiet_ops, &options);
	options.numbered = 0;
	options.hello_length = KUCOMMS_HELLO_MAX + 1;
	options.hello = (const u8 *)name;
	answer[count++] = test_try("kucomms_other", &test_quiet_ops, &options);
	options.hello_length = 1;
	options.hello = NULL;
	answer[count++] = test_try("kucomms_other", &test_quiet_ops, &options);
	/* From here on nothing is wrong with the arguments, but for two. */
	answer[count++] = test_try(name, &test_quiet_ops, NULL);
	answer[count++] = test_try("kucomms_test", &test_quiet_ops, NULL);
	name[sizeof(name) - 2] = '\0';
	answer[count++] = test_try(name, &test_quiet_ops, NULL);
	options.hello_length = 0;
	options.ring_size = U64_MAX;
	options.max_ring_size = 1;
	answer[count++] = test_try("kucomms_other", &test_quiet_ops, &options);
	options.flags = KUCOMMS_THREAD_PER_CHANNEL | KUCOMMS_RX_IN_PLACE;
	answer[count++] = test_try("kucomms_other", &test_quiet_ops, &options);
	options.busy_poll_ns = U64_MAX;
	answer[count++] = test_try("kucomms_other", &test_quiet_ops, &options);
	/* What a newer module has and does not use is no fault. */
	larger.newer = 0;
	answer[count++] = test_try("kucomms_other", &test_quiet_ops, &larger.known);
	test_answer(channel, message, answer, count * sizeof(answer[0]));
}

static int test_add(struct test_endpoint *test)
{
	const struct kucomms_endpoint_ops *ops = test->quiet ? &test_quiet_ops : &test_ops;

	test->options.size = sizeof(test->options);
	test->options.flags |= KUCOMMS_POOLS;
	test->options.max_pool_bytes = U64_MAX;
	test->endpoint = kucomms_register(test->name, ops, &test->options, test);
	return PTR_ERR_OR_ZERO(test->endpoint);
}

/* ---- parameters --------------------------------------------------------- */

static int test_get_kept(char *buffer, const struct kernel_param *param)
{
	wait_event_timeout(test_kept_wait, READ_ONCE(test_kept_done), TEST_PATIENCE);
	return sysfs_emit(buffer, "%s\n", test_kept_result);
}

static int test_get_checksums(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%d %d\n", atomic_read(&test_checksums),
			  atomic_read(&test_differences));
}

/* "NAME MILLISECONDS": wait until somebody is connected. */
static int test_set_wait_open(const char *value, const struct kernel_param *param)
{
	struct test_endpoint *test;
	char name[64];
	int milliseconds;

	if (sscanf(value, "%63s %d", name, &milliseconds) != 2)
		return -EINVAL;
	test = test_find(name);
	if (!test)
		return -ENOENT;
	return kucomms_wait_open(test->endpoint, milliseconds < 0 ? -1 :
				 milliseconds * NSEC_PER_MSEC);
}

static int test_get_lent(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%s\n", test_lent_result);
}

static const struct kernel_param_ops test_lent_ops = { .get = test_get_lent };
static const struct kernel_param_ops test_kept_ops = { .get = test_get_kept };
static const struct kernel_param_ops test_checksums_ops = { .get = test_get_checksums };
static const struct kernel_param_ops test_wait_open_ops = { .set = test_set_wait_open };

module_param_named(long_sent, test_long_sent, ulong, 0400);
MODULE_PARM_DESC(long_sent, "messages that the thread of the last storm of large ones has sent");
module_param_cb(lent, &test_lent_ops, NULL, 0400);
MODULE_PARM_DESC(lent, "what became of a loan that was out until its channel was closed");
module_param_cb(kept, &test_kept_ops, NULL, 0400);
MODULE_PARM_DESC(kept, "what was possible after a channel that was kept had been closed");
module_param_cb(checksums, &test_checksums_ops, NULL, 0400);
MODULE_PARM_DESC(checksums, "how many checksums were made, and how many changed meanwhile");
module_param_cb(wait_open, &test_wait_open_ops, NULL, 0200);
MODULE_PARM_DESC(wait_open, "write a name and milliseconds here to wait for a channel");

static void test_remove_all(void)
{
	int i = ARRAY_SIZE(test_endpoints);

	while (i-- > 0)
		if (!IS_ERR_OR_NULL(test_endpoints[i].endpoint))
			kucomms_unregister(test_endpoints[i].endpoint);
	flush_delayed_work(&test_kept_work);
}

static int __init test_init(void)
{
	int i, err;

	for (i = 0; i < ARRAY_SIZE(test_pattern); i++)
		test_pattern[i] = i % 251;
	for (i = 0; i < ARRAY_SIZE(test_endpoints); i++) {
		err = test_add(&test_endpoints[i]);
		if (err) {
			test_remove_all();
			return err;
		}
	}
	return 0;
}

static void __exit test_exit(void)
{
	test_remove_all();
}

module_init(test_init);
module_exit(test_exit);

MODULE_LICENSE("GPL");
MODULE_AUTHOR("kucomms");
MODULE_DESCRIPTION("kucomms test module: exercises the kernel API");
MODULE_VERSION("0.1.0");
