/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Measures the core of kucomms, without Python, and what the machine allows.
 * See README.md. This file has the options, the two processes and the clock.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

#include "core_bench.h"

#define REPETITIONS	15
#define JOBS_MAX	64
#define BUFFER		(1u << 20)	/* the largest message */

/* Where the two processes meet. */
struct control {
	uint64_t arrived;			/* processes, ever */
	uint32_t which;				/* of the chosen ones is next */
	uint64_t times;				/* 0: it is over */
	uint64_t ready __attribute__((aligned(2 * CACHE_LINE)));
	uint64_t go __attribute__((aligned(2 * CACHE_LINE)));
	uint64_t done __attribute__((aligned(2 * CACHE_LINE)));
};

/* A measurement that was chosen, and what came out. */
struct job {
	struct side side;
	int as_named;
	int as_also;
	uint64_t times;			/* in a repetition */
	double each_ns[REPETITIONS];
};

static const struct measurement *const all[] = {
	bare_measurements, channel_measurements, ck_measurements,
};

static const char *const unit_names[] = {
	[UNIT_NS] = "ns",
	[UNIT_GBS] = "GB/s",
	[UNIT_MESSAGES] = "M messages/s",
};

int single_threaded;

static const char **only;
static unsigned int only_count;
static double seconds = 0.5;
static int cpus[2];
static struct job jobs[JOBS_MAX];
static unsigned int job_count;
static struct control *control;
static int call;			/* an eventfd: wakes side 1 */
static volatile sig_atomic_t may_end;	/* the other process, now */

/* ---- the machine -------------------------------------------------------- */

/* The first two CPUs that we may use. */
static void find_cpus(void)
{
	unsigned int found = 0;
	cpu_set_t allowed;
	int cpu;

	CHECK(!sched_getaffinity(0, sizeof(allowed), &allowed));
	for (cpu = 0; cpu < CPU_SETSIZE && found < 2; cpu++)
		if (CPU_ISSET(cpu, &allowed))
			cpus[found++] = cpu;
	if (found < 2) {
		fprintf(stderr, "core-bench: two CPUs are needed\n");
		exit(1);
	}
}

static void pin(int cpu)
{
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	CHECK(!sched_setaffinity(0, sizeof(one), &one));
}

static double now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

/* ---- the two processes -------------------------------------------------- */

/* Both must come here for the @meeting-th time before one goes on. */
static void meet(uint64_t meeting)
{
	__atomic_fetch_add(&control->arrived, 1, __ATOMIC_SEQ_CST);
	while (__atomic_load_n(&control->arrived, __ATOMIC_ACQUIRE) <
	       2 * meeting)
		kucomms_cpu_relax();
}

static unsigned char *private_buffer(void)
{
	void *buffer;

	CHECK(!posix_memalign(&buffer, 4096, BUFFER));
	memset(buffer, 0x5a, BUFFER);
	return buffer;
}

static uint64_t shared_size(const struct measurement *m)
{
	uint64_t page = kucomms_page_size();

	return m->shared ? (m->shared(m) + page - 1) & ~(page - 1) : 0;
}

/* One process takes part in a measurement unless it is the other's alone. */
static int takes_part(const struct side *side)
{
	return !!side->measurement->run[side->number];
}

/* Prepare all that was chosen, in process @number. */
static void open_all(unsigned int number)
{
	unsigned char *out = private_buffer(), *in = private_buffer();
	unsigned int i;

	pin(cpus[number]);
	for (i = 0; i < job_count; i++) {
		struct side *side = &jobs[i].side;
		uint64_t size = shared_size(side->measurement);

		side->number = number;
		side->out = out;
		side->in = in;
		if (!takes_part(side))
			continue;
		if (size) {
			side->shared = mmap(NULL, size, PROT_READ | PROT_WRITE,
					    MAP_SHARED | MAP_POPULATE,
					    side->fd, (off_t)side->offset);
			CHECK(side->shared != MAP_FAILED);
		}
		if (side->measurement->open)
			side->measurement->open(side);
	}
	meet(1);
	for (i = 0; i < job_count; i++)
		if (takes_part(&jobs[i].side) &&
		    jobs[i].side.measurement->attach)
			jobs[i].side.measurement->attach(&jobs[i].side);
	meet(2);
}

static void close_all(void)
{
	unsigned int i;

	for (i = 0; i < job_count; i++)
		if (takes_part(&jobs[i].side) &&
		    jobs[i].side.measurement->close)
			jobs[i].side.measurement->close(&jobs[i].side);
}

/*
 * Side 1: do as side 0 says. It sleeps meanwhile, so as not to disturb the
 * measurements of one process.
 */
static void follow(void)
{
	uint64_t rounds, count;

	open_all(1);
	for (rounds = 1;; rounds++) {
		struct side *side;

		CHECK(read(call, &count, sizeof(count)) == sizeof(count));
		if (!control->times)
			break;
		side = &jobs[control->which].side;
		__atomic_store_n(&control->ready, rounds, __ATOMIC_RELEASE);
		while (__atomic_load_n(&control->go, __ATOMIC_ACQUIRE) !=
		       rounds)
			kucomms_cpu_relax();
		side->measurement->run[1](side, control->times);
		__atomic_store_n(&control->done, rounds, __ATOMIC_RELEASE);
	}
	close_all();
}

/* Wake side 1 for job @which, or to end it when @times is 0. */
static void call_other(uint32_t which, uint64_t times)
{
	uint64_t one = 1;

	control->which = which;
	control->times = times;
	CHECK(write(call, &one, sizeof(one)) == sizeof(one));
}

static void await(uint64_t *word, uint64_t value)
{
	while (__atomic_load_n(word, __ATOMIC_ACQUIRE) != value)
		kucomms_cpu_relax();
}

/* Side 0: both do it that many times. Return: the nanoseconds it took. */
static double lead(uint32_t which, uint64_t times)
{
	struct side *side = &jobs[which].side;
	int both = !!side->measurement->run[1];
	uint64_t rounds = control->go + 1;
	double start;

	if (both) {
		call_other(which, times);
		await(&control->ready, rounds);
	}
	start = now_ns();
	if (both)
		__atomic_store_n(&control->go, rounds, __ATOMIC_RELEASE);
	side->measurement->run[0](side, times);
	if (both)
		await(&control->done, rounds);
	return now_ns() - start;
}

static void other_died(int signal_number)
{
	static const char text[] = "core-bench: the other process died\n";

	(void)signal_number;
	if (may_end)
		return;
	if (write(STDERR_FILENO, text, sizeof(text) - 1) < 0)
		_exit(2);
	_exit(1);
}

/* Side 1 in a process of its own. Return: its id. */
static pid_t start_other(void)
{
	pid_t parent = getpid(), child = fork();

	CHECK(child >= 0);
	if (child)
		return child;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(1);
	follow();
	_exit(0);
}

/* ---- results ------------------------------------------------------------ */

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static void print_result(const char *name, enum unit unit, uint32_t size,
			 const double *each_ns)
{
	double values[REPETITIONS];
	unsigned int i;

	for (i = 0; i < REPETITIONS; i++) {
		if (unit == UNIT_NS)
			values[i] = each_ns[i];
		else if (unit == UNIT_GBS)
			values[i] = size / each_ns[i];
		else
			values[i] = 1e3 / each_ns[i];
	}
	qsort(values, REPETITIONS, sizeof(*values), by_value);
	printf("{\"group\":\"core\",\"name\":\"%s\",\"unit\":\"%s\","
	       "\"value\":%.6g,\"min\":%.6g,\"max\":%.6g,\"size\":%u}\n",
	       name, unit_names[unit], values[REPETITIONS / 2], values[0],
	       values[REPETITIONS - 1], size);
	fflush(stdout);
}

/*
 * The warm-up takes a fifth of the time at least; it tells how often to do it
 * in a repetition.
 */
static void warm_up(uint32_t which)
{
	double goal = seconds * 1e9 / REPETITIONS;
	double end = now_ns() + seconds * 1e9 / 5;
	uint64_t times = 1;
	double took;

	for (;;) {
		took = lead(which, times);
		if (took < goal / 2)
			times *= 2;
		else if (now_ns() >= end)
			break;
	}
	times = (uint64_t)((double)times * goal / took);
	jobs[which].times = times ? times : 1;
}

/*
 * One repetition of each measurement, then the next of each: what disturbs the
 * machine for a while disturbs all. Before each a tenth of it is not counted,
 * for the caches.
 */
static void measure_all(void)
{
	unsigned int i, repetition;

	for (i = 0; i < job_count; i++)
		warm_up(i);
	for (repetition = 0; repetition < REPETITIONS; repetition++) {
		for (i = 0; i < job_count; i++) {
			struct job *job = &jobs[i];

			lead(i, job->times / 10 + 1);
			job->each_ns[repetition] =
				lead(i, job->times) / (double)job->times;
		}
	}
}

static void print_all(void)
{
	unsigned int i;

	for (i = 0; i < job_count; i++) {
		const struct job *job = &jobs[i];
		const struct measurement *m = job->side.measurement;

		if (job->as_named)
			print_result(m->name, m->unit, m->size, job->each_ns);
		if (job->as_also)
			print_result(m->also, UNIT_GBS, m->size, job->each_ns);
	}
}

/* Make what both processes inherit, and the second process; measure. */
static void run_all(void)
{
	uint64_t offset = 0;
	int status, fd;
	unsigned int i;
	pid_t other;

	find_cpus();
	fd = memfd_create("core-bench", MFD_CLOEXEC);
	CHECK(fd >= 0);
	for (i = 0; i < job_count; i++) {
		struct side *side = &jobs[i].side;

		side->fd = fd;
		side->offset = offset;
		offset += shared_size(side->measurement);
		side->eventfd[0] = eventfd(0, EFD_CLOEXEC);
		side->eventfd[1] = eventfd(0, EFD_CLOEXEC);
		CHECK(side->eventfd[0] >= 0 && side->eventfd[1] >= 0);
	}
	CHECK(!ftruncate(fd, (off_t)offset));
	call = eventfd(0, EFD_CLOEXEC);
	CHECK(call >= 0);
	control = mmap(NULL, sizeof(*control), PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(control != MAP_FAILED);
	signal(SIGCHLD, other_died);
	other = start_other();
	open_all(0);
	measure_all();
	may_end = 1;
	call_other(0, 0);
	CHECK(waitpid(other, &status, 0) == other);
	CHECK(WIFEXITED(status) && !WEXITSTATUS(status));
	close_all();
	print_all();
}

/* ---- options ------------------------------------------------------------ */

static int chosen(const char *name)
{
	unsigned int i;

	if (!name)
		return 0;
	for (i = 0; i < only_count; i++)
		if (strstr(name, only[i]))
			return 1;
	return !only_count;
}

static void list_one(const char *name, enum unit unit, const char *missing)
{
	if (!chosen(name))
		return;
	printf("%s [%s]", name, unit_names[unit]);
	if (missing)
		printf(" (not available: %s)", missing);
	putchar('\n');
}

static void list_all(void)
{
	const struct measurement *m;
	unsigned int i;

	for (i = 0; i < sizeof(all) / sizeof(*all); i++) {
		for (m = all[i]; m->name; m++) {
			list_one(m->name, m->unit, m->missing);
			list_one(m->also, UNIT_GBS, m->missing);
		}
	}
}

/* Return: how many there are by these names, also if they cannot run. */
static unsigned int choose_all(void)
{
	const struct measurement *m;
	unsigned int i, count = 0;

	for (i = 0; i < sizeof(all) / sizeof(*all); i++) {
		for (m = all[i]; m->name; m++) {
			struct job *job = &jobs[job_count];

			job->as_named = chosen(m->name);
			job->as_also = chosen(m->also);
			if (!job->as_named && !job->as_also)
				continue;
			count++;
			if (m->missing) {
				fprintf(stderr, "core-bench: %s: %s\n",
					m->name, m->missing);
				continue;
			}
			job->side.measurement = m;
			CHECK(++job_count < JOBS_MAX);
		}
	}
	return count;
}

static const char help_text[] =
"usage: core-bench [--only NAME]... [--seconds S] [--single-threaded]\n"
"                  [--list] [--help]\n"
"\n"
"Measures the core of kucomms between two processes, each on a CPU of its own,\n"
"and what the machine allows. Prints a line of JSON for each measurement.\n"
"\n"
"  --only NAME   only measurements with NAME in their name; may be repeated\n"
"  --seconds S   for each measurement, after its warm-up (default 0.5)\n"
"  --single-threaded\n"
"                kucomms in processes without a second, sleeping thread: the C\n"
"                library then takes locks without an atomic access\n"
"  --list        what there is, with units\n"
"  --help        this\n"
"\n"
"The first two CPUs that are allowed are used; taskset allows others.\n"
"\n"
"Example: the round trip, and the bare exchange of the same bytes:\n"
"  taskset -c 2,3 core-bench --only 'kucomms round trip 64 B' \\\n"
"      --only 'ping-pong 96 B' --seconds 2\n";

static void wrong(const char *text)
{
	fprintf(stderr, "core-bench: %s; see core-bench --help\n", text);
	exit(2);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "only", required_argument, NULL, 'o' },
		{ "seconds", required_argument, NULL, 's' },
		{ "single-threaded", no_argument, NULL, '1' },
		{ "list", no_argument, NULL, 'l' },
		{ "help", no_argument, NULL, 'h' },
		{ NULL, 0, NULL, 0 },
	};
	int option, list = 0;
	char *end;

	only = calloc((size_t)argc, sizeof(*only));
	CHECK(only);
	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (option) {
		case 'o':
			only[only_count++] = optarg;
			break;
		case 's':
			seconds = strtod(optarg, &end);
			if (end == optarg || *end ||
			    !(seconds > 0 && seconds <= 3600))
				wrong("--seconds wants a number of seconds");
			break;
		case '1':
			single_threaded = 1;
			break;
		case 'l':
			list = 1;
			break;
		case 'h':
			fputs(help_text, stdout);
			return 0;
		default:
			wrong("an option is wrong");
		}
	}
	if (optind < argc)
		wrong("unknown argument");
	if (list) {
		list_all();
		return 0;
	}
	if (!choose_all())
		wrong("there is no such measurement");
	if (job_count)
		run_all();
	free(only);
	return 0;
}
