// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * A C++ program as the listening end: echoes every message to its sender. One
 * peer at a time; shows how a link fits into a poll loop.
 *
 *	c++ -O2 -I$(python -c 'import kucomms; print(kucomms.get_include())') \
 *		cpp_echo_server.cpp -o cpp_echo_server
 *	./cpp_echo_server shm://echo
 */
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <system_error>

#include <sys/eventfd.h>

#include <kucomms/client.h>

namespace {

volatile std::sig_atomic_t stop;
int stop_event = -1;

extern "C" void on_signal(int)
{
	const int saved = errno;
	const uint64_t one = 1;

	stop = 1;
	/* Stays readable, so a poll() that begins after it returns as well. */
	if (write(stop_event, &one, sizeof(one)) < 0)
		_exit(1);
	errno = saved;
}

void catch_signals()
{
	struct sigaction action;

	stop_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (stop_event < 0)
		throw std::system_error(errno, std::generic_category());
	std::memset(&action, 0, sizeof(action));
	action.sa_handler = on_signal;
	sigaction(SIGINT, &action, nullptr);
	sigaction(SIGTERM, &action, nullptr);
}

/* A negative errno as an exception; anything else is handed on. */
int checked(int result)
{
	if (result < 0)
		throw std::system_error(-result, std::generic_category());
	return result;
}

/* Sleep until @fd is readable or a signal came. */
void wait_for(int fd)
{
	struct pollfd fds[2] = { { fd, POLLIN, 0 }, { stop_event, POLLIN, 0 } };

	if (poll(fds, 2, -1) < 0 && errno != EINTR)
		throw std::system_error(errno, std::generic_category());
}

class Listener {
public:
	explicit Listener(const char *url)
	{
		checked(kucomms_listener_open(&listener_, url, 0));
	}
	~Listener() { kucomms_listener_close(&listener_); }
	Listener(const Listener &) = delete;
	Listener &operator=(const Listener &) = delete;

	int fd() const { return listener_.socket; }

	/* False: nobody has connected. */
	bool accept(struct kucomms_client *client)
	{
		const int err = kucomms_listener_accept(&listener_, client, 0);

		if (err == -EAGAIN || err == -EINTR)
			return false;
		checked(err);
		return true;
	}

private:
	struct kucomms_listener listener_;
};

/* Neither copied nor moved: the rings point into themselves. */
class Link {
public:
	Link() { kucomms_client_clear(&client_); }
	~Link() { kucomms_client_close(&client_); }
	Link(const Link &) = delete;
	Link &operator=(const Link &) = delete;

	struct kucomms_client *get() { return &client_; }

private:
	struct kucomms_client client_;
};

struct Total {
	unsigned long long messages = 0;
	unsigned long long bytes = 0;
};

/* Echo until the peer is gone or a signal came. */
void echo(struct kucomms_client *link, Total *total)
{
	const int fd = checked(kucomms_client_fd(link));
	struct kucomms_view message;

	while (!stop) {
		ssize_t blocked = -1;
		int err = kucomms_client_receive(link, &message, 0);

		if (err == -EPIPE)
			return;
		if (!err) {
			err = kucomms_client_send(link, message.data,
						  message.length, message.type,
						  message.id,
						  message.user_value, 0);
			if (!err) {
				total->messages++;
				total->bytes += message.length;
				kucomms_client_release(link, &message);
				continue;
			}
			if (err == -EPIPE)
				return;
			blocked = message.length;
		}
		if (err != -EAGAIN)
			checked(err);
		/* While the answer does not fit, new messages are no news. */
		if (!checked(kucomms_client_arm(link, blocked < 0, blocked)))
			wait_for(fd);
	}
}

void serve(const char *url, bool once)
{
	Listener listener(url);

	std::printf("listening on %s\n", url);
	std::fflush(stdout);
	while (!stop) {
		Total total;
		Link link;

		if (!listener.accept(link.get())) {
			wait_for(listener.fd());
			continue;
		}
		const int pid = link.get()->peer_pid;

		try {
			echo(link.get(), &total);
		} catch (const std::system_error &error) {
			std::fprintf(stderr, "peer %d: %s\n", pid,
				     error.what());
		}
		std::printf("peer %d: %llu messages, %llu bytes echoed\n", pid,
			    total.messages, total.bytes);
		std::fflush(stdout);
		if (once)
			return;
	}
}

} // namespace

int main(int argc, char **argv)
{
	const bool once = argc == 3 && !std::strcmp(argv[2], "--once");

	if (argc != 2 && !once) {
		std::fprintf(stderr,
			     "usage: %s shm://NAME [--once]\n"
			     "--once: end when the first peer has gone\n",
			     argv[0]);
		return 2;
	}
	try {
		catch_signals();
		serve(argv[1], once);
	} catch (const std::system_error &error) {
		std::fprintf(stderr, "%s: %s\n", argv[1], error.what());
		return 1;
	}
	return 0;
}
