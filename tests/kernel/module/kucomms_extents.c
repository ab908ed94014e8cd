// SPDX-License-Identifier: GPL-2.0-only
/*
 * Exercises the free pages of pools from inside: against a model, and by the clock. The
 * type of a message says what to do, its data are the arguments; each is answered by an
 * array of 64-bit numbers. tests/kernel/test_extents.py is the other half.
 */
#include <linux/bitmap.h>
#include <linux/err.h>
#include <linux/kernel.h>
#include <linux/ktime.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/time64.h>

#include <kucomms/kucomms.h>

/* What to do with a message. */
enum {
	DO_RANDOM,	/* PAGES, STEPS, SEED: answers what went wrong, and in which step */
	DO_TIME,	/* PAGES, PATTERN, BATCHES: answers the longest times, in nanoseconds */
};

/* How a pool is fragmented. */
enum {
	EVERY_SECOND,	/* page is taken */
	SOME,		/* buffers of up to 32 pages, half of them freed again */
	ALL,		/* pages are taken, one by one */
};

/* What has gone wrong in DO_RANDOM. */
enum {
	NOTHING_WRONG,
	NOT_FOUND,	/* there was room */
	FOUND_ANYWAY,	/* there was none */
	OVERLAPS,	/* what is used */
	NOT_THE_BEST,	/* a smaller extent, or an earlier one of this size, has room, too */
	NOT_JOINED,	/* all is free, and is not to be had at once */
	NO_MEMORY,
};

#define EXTENTS_LONGEST	32	/* pages of a random buffer */
#define EXTENTS_BATCH	32	/* operations, */
#define EXTENTS_REPEATS	8	/* repeated, of which the quickest counts */

/* Always the same numbers for a seed. */
static u32 extents_random(u64 *seed, u32 below)
{
	*seed = *seed * 6364136223846793005ULL + 1442695040888963407ULL;
	return (*seed >> 33) % below;
}

static u64 extents_argument(const struct kucomms_message *message, int i)
{
	const u64 *data = message->data;

	return message->length >= (i + 1) * sizeof(u64) ? READ_ONCE(data[i]) : 0;
}

/* ---- against a model ----------------------------------------------------- */

struct extents_model {
	struct kucomms_pool *pool;
	void *at;			/* its first page */
	unsigned long count;
	unsigned long *used;
	struct kucomms_buffer **held;	/* by their first page */
};

static unsigned long extents_pages(const struct kucomms_buffer *buffer)
{
	return DIV_ROUND_UP(kucomms_buffer_length(buffer), PAGE_SIZE);
}

/* Where the best fit is, or count. */
static unsigned long extents_expected(const struct extents_model *model, unsigned long pages)
{
	unsigned long first, end, best = model->count, size = ULONG_MAX;

	for (first = 0; first < model->count; first = end) {
		first = find_next_zero_bit(model->used, model->count, first);
		end = find_next_bit(model->used, model->count, first);
		if (end - first >= pages && end - first < size) {
			best = first;
			size = end - first;
		}
	}
	return best;
}

static int extents_allocate(struct extents_model *model, u64 length)
{
	unsigned long pages = DIV_ROUND_UP(length, PAGE_SIZE), page;
	unsigned long expected = extents_expected(model, pages);
	struct kucomms_buffer *buffer = kucomms_allocate(model->pool, length);

	if (IS_ERR(buffer))
		return expected == model->count ? NOTHING_WRONG : NOT_FOUND;
	page = (kucomms_buffer_data(buffer) - model->at) >> PAGE_SHIFT;
	if (page + pages > model->count ||
	    find_next_bit(model->used, page + pages, page) < page + pages)
		return OVERLAPS;
	bitmap_set(model->used, page, pages);
	model->held[page] = buffer;
	if (expected == model->count)
		return FOUND_ANYWAY;
	return page == expected ? NOTHING_WRONG : NOT_THE_BEST;
}

/* The first one that is held from this page on. */
static void extents_free(struct extents_model *model, unsigned long page)
{
	struct kucomms_buffer *buffer;

	while (page < model->count && !model->held[page])
		page++;
	if (page == model->count)
		return;
	buffer = model->held[page];
	model->held[page] = NULL;
	bitmap_clear(model->used, page, extents_pages(buffer));
	kucomms_free_buffer(buffer);
}

static int extents_free_all(struct extents_model *model)
{
	unsigned long page;
	int wrong;

	for (page = 0; page < model->count; page++)
		extents_free(model, page);
	wrong = extents_allocate(model, (u64)model->count << PAGE_SHIFT);
	extents_free(model, 0);
	return wrong == NOT_FOUND ? NOT_JOINED : wrong;
}

/* One random step; from time to time all is freed. */
static int extents_step(struct extents_model *model, u64 *seed)
{
	u32 longest = min_t(u32, model->count, 1 << extents_random(seed, 8));

	if (!extents_random(seed, 500))
		return extents_free_all(model);
	if (extents_random(seed, 2))
		return extents_allocate(model, 1 + extents_random(seed, longest << PAGE_SHIFT));
	extents_free(model, extents_random(seed, model->count));
	return NOTHING_WRONG;
}

static int extents_begin(struct extents_model *model, struct kucomms_channel *channel, u64 pages)
{
	struct kucomms_buffer *all;

	model->count = pages;
	model->pool = kucomms_open_pool(channel, pages << PAGE_SHIFT, 0);
	if (IS_ERR(model->pool))
		return NO_MEMORY;
	model->used = bitmap_zalloc(pages, GFP_KERNEL);
	model->held = kvcalloc(pages, sizeof(*model->held), GFP_KERNEL);
	if (!model->used || !model->held)
		return NO_MEMORY;
	all = kucomms_allocate(model->pool, pages << PAGE_SHIFT);
	if (IS_ERR(all))
		return NOT_FOUND;
	model->at = kucomms_buffer_data(all);
	kucomms_free_buffer(all);
	return NOTHING_WRONG;
}

static void extents_end(struct extents_model *model)
{
	unsigned long page;

	for (page = 0; model->held && page < model->count; page++)
		if (model->held[page])
			kucomms_free_buffer(model->held[page]);
	if (!IS_ERR(model->pool))
		kucomms_close_pool(model->pool);
	bitmap_free(model->used);
	kvfree(model->held);
}

static void extents_try(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	u64 steps = extents_argument(message, 1), seed = extents_argument(message, 2), step;
	struct extents_model model = { };
	int wrong = extents_begin(&model, channel, extents_argument(message, 0));
	u64 answer[2];

	for (step = 0; step < steps && !wrong; step++) {
		wrong = extents_step(&model, &seed);
		cond_resched();
	}
	if (!wrong)
		wrong = extents_free_all(&model);
	extents_end(&model);
	answer[0] = wrong;
	answer[1] = step;
	kucomms_reply(channel, message, answer, sizeof(answer));
}

/* ---- by the clock -------------------------------------------------------- */

struct extents_times {
	u64 allocate;
	u64 fail;
	u64 free;
};

struct extents_timed {
	struct kucomms_pool *pool;
	struct kucomms_buffer **held;
	unsigned long count;		/* of them */
	unsigned long pages;
	u64 seed;
};

static struct kucomms_buffer *extents_timed_allocate(struct kucomms_pool *pool, u64 length,
						     u64 *most)
{
	struct kucomms_buffer *buffer;
	unsigned long irq;
	u64 begin;

	local_irq_save(irq);
	begin = ktime_get_ns();
	buffer = kucomms_allocate(pool, length);
	*most = max(*most, ktime_get_ns() - begin);
	local_irq_restore(irq);
	return buffer;
}

static void extents_timed_free(struct kucomms_buffer *buffer, u64 *most)
{
	unsigned long irq;
	u64 begin;

	local_irq_save(irq);
	begin = ktime_get_ns();
	kucomms_free_buffer(buffer);
	*most = max(*most, ktime_get_ns() - begin);
	local_irq_restore(irq);
}

/* Free some, and allocate as much again. What fails wants more than is in a row. */
static void extents_once(struct extents_timed *timed, unsigned long at, struct extents_times *times)
{
	struct kucomms_buffer **held, *none;
	u64 lengths[EXTENTS_BATCH];
	unsigned long i;

	for (i = 0; i < EXTENTS_BATCH; i++) {
		held = &timed->held[(at + i * 7919) % timed->count];
		lengths[i] = *held ? kucomms_buffer_length(*held) : 0;
		if (*held)
			extents_timed_free(*held, &times->free);
		*held = NULL;
	}
	for (i = 0; i < EXTENTS_BATCH; i++) {
		held = &timed->held[(at + i * 7919) % timed->count];
		none = extents_timed_allocate(timed->pool, (u64)timed->pages / 4 << PAGE_SHIFT,
					      &times->fail);
		if (!IS_ERR(none))
			times->fail = U64_MAX;
		if (!IS_ERR(none))
			kucomms_free_buffer(none);
		if (!lengths[i] || *held)
			continue;
		*held = extents_timed_allocate(timed->pool, lengths[i], &times->allocate);
		if (IS_ERR(*held))
			*held = NULL;
	}
}

/* The longest of a batch in its quickest repetition: others disturb most, but not all. */
static void extents_batch(struct extents_timed *timed, struct extents_times *most)
{
	unsigned long at = extents_random(&timed->seed, timed->count);
	struct extents_times best = { U64_MAX, U64_MAX, U64_MAX }, times;
	int i;

	for (i = 0; i < EXTENTS_REPEATS; i++) {
		times = (struct extents_times) { };
		extents_once(timed, at, &times);
		best.allocate = min(best.allocate, times.allocate);
		best.fail = min(best.fail, times.fail);
		best.free = min(best.free, times.free);
		cond_resched();
	}
	most->allocate = max(most->allocate, best.allocate);
	most->fail = max(most->fail, best.fail);
	most->free = max(most->free, best.free);
}

/* Fill the pool, and free what the pattern wants free. */
static void extents_fragment(struct extents_timed *timed, u64 pattern)
{
	struct kucomms_buffer *buffer;
	unsigned long i, kept = 0;
	u64 length = PAGE_SIZE;

	for (i = 0; i < timed->pages; i++) {
		if (pattern == SOME)
			length = (1 + extents_random(&timed->seed, EXTENTS_LONGEST)) << PAGE_SHIFT;
		buffer = kucomms_allocate(timed->pool, length);
		if (IS_ERR(buffer))
			break;
		timed->held[timed->count++] = buffer;
		cond_resched();
	}
	for (i = 0; i < timed->count; i++) {
		if ((pattern == EVERY_SECOND && i % 2) ||
		    (pattern == SOME && extents_random(&timed->seed, 2)))
			kucomms_free_buffer(timed->held[i]);
		else
			timed->held[kept++] = timed->held[i];
		cond_resched();
	}
	timed->count = kept;
}

static void extents_measure(struct extents_timed *timed, u64 pattern, u64 batches,
			    struct extents_times *most)
{
	unsigned long i;

	timed->held = kvcalloc(timed->pages, sizeof(*timed->held), GFP_KERNEL);
	if (!timed->held)
		return;
	extents_fragment(timed, pattern);
	/* What takes a millisecond is too slow; no more of it is needed. */
	while (timed->count && batches-- &&
	       max3(most->allocate, most->fail, most->free) < NSEC_PER_MSEC)
		extents_batch(timed, most);
	for (i = 0; i < timed->count; i++) {
		if (timed->held[i])
			kucomms_free_buffer(timed->held[i]);
		cond_resched();
	}
	kvfree(timed->held);
}

static void extents_time(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	struct extents_timed timed = { .pages = extents_argument(message, 0), .seed = 1 };
	struct extents_times most = { };

	timed.pool = kucomms_open_pool(channel, (u64)timed.pages << PAGE_SHIFT, 0);
	if (!IS_ERR(timed.pool)) {
		extents_measure(&timed, extents_argument(message, 1), extents_argument(message, 2),
				&most);
		kucomms_close_pool(timed.pool);
	}
	kucomms_reply(channel, message, &most, sizeof(most));
}

static void extents_message(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	switch (message->type) {
	case DO_RANDOM:
		extents_try(channel, message);
		break;
	case DO_TIME:
		extents_time(channel, message);
		break;
	}
}

static const struct kucomms_endpoint_ops extents_ops = {
	.size = sizeof(extents_ops),
	.message = extents_message,
};

static struct kucomms_endpoint *extents_endpoint;

static int __init extents_init(void)
{
	static const struct kucomms_endpoint_options options = {
		.size = sizeof(options),
		.flags = KUCOMMS_POOLS,
	};

	extents_endpoint = kucomms_register("kucomms_extents", &extents_ops, &options, NULL);
	return PTR_ERR_OR_ZERO(extents_endpoint);
}

static void __exit extents_exit(void)
{
	kucomms_unregister(extents_endpoint);
}

module_init(extents_init);
module_exit(extents_exit);

MODULE_LICENSE("GPL");
MODULE_AUTHOR("kucomms");
MODULE_DESCRIPTION("kucomms test module: exercises the free pages of pools");
MODULE_VERSION("0.1.0");
