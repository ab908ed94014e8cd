// SPDX-License-Identifier: MIT
/*
 * What is cut, over client.h: one end of a link that goes through all steps
 * once. See victim.py, which does the same in Python and says how it is told.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include <kucomms/client.h>

#define TYPE_DATA	1
#define TYPE_END	2
#define TYPE_COUNT	3
#define LENGTH		64
#define BEFORE		3	/* messages sent before the step "send" */
#define AFTER		3	/* and after all the others */
#define RING_SIZE	4096
#define PATIENCE_MS	30000

static struct kucomms_client peer;
static struct kucomms_listener listener;
static const char *cut;		/* the step */

static void mark(const char *step)
{
	if (!strcmp(step, cut))
		kill(getpid(), SIGTRAP);
}

/* Nothing but a fault makes a step fail: tell it, and do it again without. */
static int again(const char *step, int err)
{
	mark(step);
	if (err >= 0)
		return 0;
	printf("error %s errno %d\n", step, -err);
	fflush(stdout);
	cut = "";
	return 1;
}

static void need(int err, const char *what)
{
	if (err >= 0)
		return;
	printf("failed %s: %s\n", what, strerror(-err));
	fflush(stdout);
	_exit(1);
}

static void fill(unsigned char *data, uint64_t id)
{
	size_t i;

	for (i = 0; i < LENGTH; i++)
		data[i] = (unsigned char)(id * 31 + i);
}

static int send_message(uint64_t id)
{
	unsigned char data[LENGTH];

	fill(data, id);
	return kucomms_client_send(&peer, data, LENGTH, TYPE_DATA, id, 0,
				   PATIENCE_MS);
}

static int commit(struct kucomms_frame *frame, uint64_t id)
{
	unsigned char data[LENGTH];

	fill(data, id);
	kucomms_channel_fill(frame, data, LENGTH, TYPE_DATA, id, 0);
	kucomms_ring_commit(frame, LENGTH, 0);
	return kucomms_channel_publish(&peer.channel) ?
	       kucomms_client_ring(&peer) : 0;
}

/* How many came, in order, or a negative errno. */
static int64_t receive_rest(uint64_t count)
{
	struct kucomms_view view;
	unsigned char data[LENGTH];
	int err;

	for (;;) {
		err = kucomms_client_receive(&peer, &view, PATIENCE_MS);
		if (err)
			return err;
		if (view.type == TYPE_END) {
			kucomms_client_release(&peer, &view);
			return (int64_t)count;
		}
		fill(data, count);
		if (view.id != count || view.length != LENGTH ||
		    memcmp(view.data, data, LENGTH))
			return -EILSEQ;
		kucomms_client_release(&peer, &view);
		count++;
	}
}

static void steps(const char *role, const char *url)
{
	int listens = !strcmp(role, "listener");
	struct kucomms_frame *frame;
	struct kucomms_view view;
	int64_t count;
	uint64_t id;
	int err;

	if (listens)
		do {
			mark("listen");
			err = kucomms_listener_open(&listener, url, RING_SIZE);
		} while (again("listen", err));
	do {
		mark("connect");
		err = listens ?
		      kucomms_listener_accept(&listener, &peer, PATIENCE_MS) :
		      kucomms_connect(&peer, url, RING_SIZE, PATIENCE_MS);
	} while (again("connect", err));
	for (id = 0; id < BEFORE; id++)
		need(send_message(id), "send");
	do {
		mark("send");
		err = send_message(id);
	} while (again("send", err));
	id++;
	do {
		mark("reserve");
		err = kucomms_channel_reserve(&peer.channel, LENGTH, &frame,
					      NULL);
	} while (again("reserve", err));
	need(send_message(id + 1), "send");	/* behind what is half-written */
	do {
		mark("commit");
		err = commit(frame, id);
	} while (again("commit", err));
	id += 2;
	do {
		mark("receive");
		err = kucomms_client_receive(&peer, &view, PATIENCE_MS);
	} while (again("receive", err));
	mark("release");
	kucomms_client_release(&peer, &view);
	mark("release");
	for (; id < BEFORE + 3 + AFTER; id++)
		need(send_message(id), "send");
	count = receive_rest(1);
	need((int)count, "receive");
	need(kucomms_client_send(&peer, NULL, 0, TYPE_COUNT, id,
				 (uint64_t)count, PATIENCE_MS), "send");
	mark("close");
	kucomms_client_close(&peer);
	mark("close");
	mark("unlisten");
	if (listens)
		kucomms_listener_close(&listener);
	mark("unlisten");
}

/* The second mark of one that is not traced any more. */
static void unmarked(int number)
{
	(void)number;
}

static int descriptors(void)
{
	int count = 0, fd;

	for (fd = 0; fd < 256; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

static void victim(const char *role, const char *url, const char *step)
{
	int before = descriptors();
	char go;

	cut = step;
	/* Not SIG_IGN, which the kernel undoes when a step is trapped. */
	signal(SIGTRAP, unmarked);
	prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
	printf("pid %d\n", (int)getpid());
	fflush(stdout);
	if (read(0, &go, 1) != 1)
		_exit(1);
	steps(role, url);
	printf("leaked %d\n", descriptors() - before);
	fflush(stdout);
	_exit(0);
}

/* A line without stdio, whose buffer a child would share. */
static int line(char *text, size_t size)
{
	size_t length;

	for (length = 0; length + 1 < size; length++) {
		if (read(0, text + length, 1) != 1)
			return 0;
		if (text[length] == '\n')
			break;
	}
	text[length] = 0;
	return 1;
}

int main(void)
{
	char text[256], role[16], url[128], step[16];
	int status;
	pid_t pid;

	while (line(text, sizeof(text))) {
		if (sscanf(text, "%15s %127s %15s", role, url, step) != 3)
			return 2;
		pid = fork();
		if (!pid)
			victim(role, url, step);
		if (pid < 0 || waitpid(pid, &status, 0) != pid)
			return 1;
		printf("status %d\n", WIFSIGNALED(status) ?
		       -WTERMSIG(status) : WEXITSTATUS(status));
		fflush(stdout);
	}
	return 0;
}
