/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * kucomms._core._ring: what runs per message.
 *
 * These calls keep the GIL: they are shorter than giving it up and getting it
 * back, and with another busy thread each getting back may take a whole switch
 * interval. Set-up and polling go through _setup (cffi), which drops it.
 *
 * A call answers with a small number, not with an exception: the caller knows
 * the URL and writes the message. Only what is wrong with an argument
 * (TypeError, OverflowError, BufferError) and want of memory is raised here.
 *
 * Everything here runs under the GIL, also the ends of views, so that the
 * objects need no lock of their own; struct kucomms_channel has one, for C
 * threads.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <structmember.h>

#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <kucomms/channel.h>

enum status {
	OK,		/* done */
	FULL,		/* no room now */
	EMPTY,		/* no message now */
	TOO_LARGE,	/* never fits */
	CLOSED,		/* not open (any more) for this */
	PROTOCOL,	/* the peer broke the rules */
	WRONG_THREAD,	/* of another thread than attach() */
	FORKED,		/* the channel was made before a fork */
	TOO_MANY_LOANS,
};

struct module_state {
	PyTypeObject *channel_type;
	PyTypeObject *reservation_type;
	PyTypeObject *borrow_type;
	PyTypeObject *message_type;	/* set by configure() */
	PyObject *name_data;
	PyObject *name_type;
	PyObject *name_id;
	PyObject *name_user_value;
};

typedef struct channel_object {
	PyObject_HEAD
	struct kucomms_channel *channel;
	PyObject *doorbell;		/* wakes the peer; any thread */
	PyObject *room;			/* called when a dropped loan's bytes are free */
	int receiving;			/* inside receive(), which runs Python code */
	unsigned long owner;		/* thread of attach() */
	unsigned long generation;	/* of forks, at birth */
	int attached;
	int open;			/* for sending */
	int mapped;
	int unmap_wanted;
	unsigned int users;		/* loans and borrows whose bytes are in use */
	unsigned int loans;
	unsigned int loan_limit;
	struct module_state *state;
	struct channel_object *next;	/* of all in the process, for fork */
	struct channel_object **link;
} ChannelObject;

typedef struct {
	PyObject_HEAD
	ChannelObject *channel;
	struct kucomms_frame *frame;
	struct kucomms_pin pin;
	Py_ssize_t exports;
	uint32_t length;
	int active;			/* neither committed nor discarded */
	int pinned;
} ReservationObject;

typedef struct {
	PyObject_HEAD
	ChannelObject *channel;
	struct kucomms_view view;
	struct kucomms_pin pin;
	Py_ssize_t exports;
	int released;
	int pinned;
} BorrowObject;

/* ---- fork ---------------------------------------------------------------- */

static pthread_mutex_t all_lock = PTHREAD_MUTEX_INITIALIZER;
static ChannelObject *all_channels;
static unsigned long fork_generation;

static void before_fork(void)
{
	pthread_mutex_lock(&all_lock);
}

static void after_fork_parent(void)
{
	pthread_mutex_unlock(&all_lock);
}

static void fill_hole(void *at, size_t size)
{
	if (at)
		mmap(at, size, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
		     -1, 0);
}

/*
 * The child does not have the mappings. It gets empty pages in their place, so
 * that a view that it inherited reads zeros instead of crashing, and nothing
 * else can be mapped where a later munmap() would hit it.
 */
static void after_fork_child(void)
{
	ChannelObject *self;
	int i;

	fork_generation++;
	for (self = all_channels; self; self = self->next) {
		struct kucomms_channel *channel = self->channel;

		for (i = 0; i < 2; i++) {
			fill_hole(channel->side[i].control,
				  KUCOMMS_CONTROL_PAGES * channel->page_size);
			fill_hole(channel->side[i].data,
				  2 * channel->ring_size);
		}
	}
	pthread_mutex_unlock(&all_lock);
}

static void all_add(ChannelObject *self)
{
	pthread_mutex_lock(&all_lock);
	self->next = all_channels;
	self->link = &all_channels;
	if (all_channels)
		all_channels->link = &self->next;
	all_channels = self;
	pthread_mutex_unlock(&all_lock);
}

static void all_remove(ChannelObject *self)
{
	pthread_mutex_lock(&all_lock);
	*self->link = self->next;
	if (self->next)
		self->next->link = self->link;
	pthread_mutex_unlock(&all_lock);
}

/* ---- helpers ------------------------------------------------------------- */

/*
 * The slots of the stable ABI are a void *, a function is not; the compiler has
 * to be told that it is meant (POSIX allows it).
 */
#define SLOT(id, function) { id, (void *)(uintptr_t)(function) }
#define METHOD(name, function, flags, doc) \
	{ name, (PyCFunction)(void (*)(void))(function), flags, doc }

static int forked(const ChannelObject *self)
{
	return self->generation != fork_generation;
}

static void unmap_if_unused(ChannelObject *self)
{
	if (self->unmap_wanted && !self->users && self->mapped) {
		self->mapped = 0;
		all_remove(self);
		kucomms_channel_unmap(self->channel);
	}
}

/* Call back, whatever exception is under way; @callback may be cleared in it. */
static void call_back(PyObject *callback)
{
	PyObject *result, *type, *value, *traceback;

	if (!callback)
		return;
	Py_INCREF(callback);
	PyErr_Fetch(&type, &value, &traceback);
	result = PyObject_CallNoArgs(callback);
	if (result)
		Py_DECREF(result);
	else
		PyErr_WriteUnraisable(callback);
	PyErr_Restore(type, value, traceback);
	Py_DECREF(callback);
}

static void ring_doorbell(ChannelObject *self)
{
	call_back(self->doorbell);
}

/*
 * Around what touches the ring and may run Python code (allocating can run the
 * garbage collector): the pages stay mapped until the matching end_use().
 */
static void begin_use(ChannelObject *self)
{
	self->users++;
}

static void end_use(ChannelObject *self)
{
	self->users--;
	unmap_if_unused(self);
}

static enum status status_of(int err)
{
	switch (err) {
	case -EAGAIN:
		return FULL;
	case -EMSGSIZE:
		return TOO_LARGE;
	default:
		return PROTOCOL;
	}
}

static enum status may_send(const ChannelObject *self, int any_thread)
{
	if (forked(self))
		return FORKED;
	if (!self->open)
		return CLOSED;
	if (!any_thread && self->owner != PyThread_get_thread_ident())
		return WRONG_THREAD;
	return OK;
}

static enum status may_receive(const ChannelObject *self)
{
	if (forked(self))
		return FORKED;
	if (!self->attached || !self->mapped)
		return CLOSED;
	if (self->owner != PyThread_get_thread_ident())
		return WRONG_THREAD;
	return OK;
}

static PyObject *from_status(enum status status)
{
	return PyLong_FromLong(status);
}

static int check_args(const char *name, Py_ssize_t got, Py_ssize_t wanted)
{
	if (got == wanted)
		return 0;
	PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", name,
		     wanted, got);
	return -1;
}

/* ---- what is to be sent -------------------------------------------------- */

struct outgoing {
	const void *data;
	Py_ssize_t length;
	uint64_t type;
	uint64_t id;
	uint64_t user_value;
	PyObject *owner;	/* keeps data alive: bytes, or NULL with view */
	Py_buffer view;
	int has_view;
};

static void outgoing_clear(struct outgoing *out)
{
	if (out->has_view)
		PyBuffer_Release(&out->view);
	out->has_view = 0;
	Py_CLEAR(out->owner);
}

static int outgoing_data(struct outgoing *out, PyObject *data)
{
	if (PyBytes_CheckExact(data)) {
		char *at;

		if (PyBytes_AsStringAndSize(data, &at, &out->length))
			return -1;
		out->data = at;
		out->owner = Py_NewRef(data);
		return 0;
	}
	if (PyObject_GetBuffer(data, &out->view, PyBUF_SIMPLE))
		return -1;
	out->has_view = 1;
	out->data = out->view.buf;
	out->length = out->view.len;
	return 0;
}

static int header_value(PyObject *object, uint64_t *value)
{
	if (object == Py_None)
		return 0;
	*value = PyLong_AsUnsignedLongLong(object);
	return *value == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

static int header_attribute(PyObject *message, PyObject *name, uint64_t *value)
{
	PyObject *object = PyObject_GetAttr(message, name);
	int err;

	if (!object)
		return -1;
	err = header_value(object, value);
	Py_DECREF(object);
	return err;
}

/* Read @data (bytes-like or a Message) and what overrides its header. */
static int outgoing_read(struct module_state *state, struct outgoing *out,
			 PyObject *data, PyObject *type, PyObject *id,
			 PyObject *user_value)
{
	memset(out, 0, sizeof(*out));
	if (state->message_type && PyObject_TypeCheck(data, state->message_type)) {
		PyObject *inner = PyObject_GetAttr(data, state->name_data);
		int err;

		if (!inner)
			return -1;
		err = outgoing_data(out, inner);
		Py_DECREF(inner);
		if (err ||
		    header_attribute(data, state->name_type, &out->type) ||
		    header_attribute(data, state->name_id, &out->id) ||
		    header_attribute(data, state->name_user_value,
				     &out->user_value))
			goto error;
	} else if (outgoing_data(out, data)) {
		goto error;
	}
	if (header_value(type, &out->type) || header_value(id, &out->id) ||
	    header_value(user_value, &out->user_value))
		goto error;
	return 0;
error:
	outgoing_clear(out);
	return -1;
}

/* Put it into the ring, without the doorbell. */
static enum status outgoing_put(ChannelObject *self, struct outgoing *out,
				uint32_t flags)
{
	int err;

	if ((uint64_t)out->length > UINT32_MAX)
		return TOO_LARGE;
	err = kucomms_channel_put(self->channel, out->data,
				  (uint32_t)out->length, flags, out->type,
				  out->id, out->user_value);
	return err ? status_of(err) : OK;
}

/* ---- Reservation --------------------------------------------------------- */

static void reservation_unpin(ReservationObject *self)
{
	ChannelObject *channel = self->channel;

	if (!self->pinned)
		return;
	self->pinned = 0;
	channel->loans--;
	channel->users--;
	if (!forked(channel))
		kucomms_channel_unpin_tx(channel->channel, &self->pin);
	unmap_if_unused(channel);
}

static void reservation_drop(ReservationObject *self)
{
	if (!self->active)
		return;
	self->active = 0;
	if (!forked(self->channel) &&
	    kucomms_channel_discard(self->channel->channel, self->frame,
				    self->length))
		ring_doorbell(self->channel);
	if (!self->exports)
		reservation_unpin(self);
}

PyDoc_STRVAR(reservation_commit_doc,
"commit() -> status\n\nSend the message. EMPTY when a view of its data is still\n"
"alive: then it was discarded, and its bytes stay unused until the view dies.");

static PyObject *reservation_commit(ReservationObject *self, PyObject *unused)
{
	ChannelObject *channel = self->channel;

	(void)unused;
	if (forked(channel))
		return from_status(FORKED);
	if (!self->active)
		return from_status(CLOSED);
	if (self->exports) {
		reservation_drop(self);
		return from_status(EMPTY);
	}
	if (!channel->open) {
		reservation_drop(self);
		return from_status(CLOSED);
	}
	self->active = 0;
	begin_use(channel);
	kucomms_ring_commit(self->frame, self->length, 0);
	reservation_unpin(self);
	if (kucomms_channel_publish(channel->channel))
		ring_doorbell(channel);
	end_use(channel);
	return from_status(OK);
}

PyDoc_STRVAR(reservation_discard_doc,
"discard() -> bool\n\nDo not send the message. False when a view is still alive.");

static PyObject *reservation_discard(ReservationObject *self, PyObject *unused)
{
	(void)unused;
	reservation_drop(self);
	return PyBool_FromLong(!self->exports);
}

static int reservation_getbuffer(ReservationObject *self, Py_buffer *view,
				 int flags)
{
	if (!self->active) {
		PyErr_SetString(PyExc_BufferError, "the loan is over");
		return -1;
	}
	if (PyBuffer_FillInfo(view, (PyObject *)self, self->frame + 1,
			      (Py_ssize_t)self->length, 0, flags))
		return -1;
	self->exports++;
	return 0;
}

static void reservation_releasebuffer(ReservationObject *self, Py_buffer *view)
{
	(void)view;
	if (!--self->exports && !self->active) {
		reservation_unpin(self);
		call_back(self->channel->room);
	}
}

static void reservation_dealloc(ReservationObject *self)
{
	PyTypeObject *type = Py_TYPE(self);

	if (self->channel) {
		reservation_drop(self);
		Py_DECREF(self->channel);
	}
	PyObject_Free(self);
	Py_DECREF(type);
}

static PyMethodDef reservation_methods[] = {
	METHOD("commit", reservation_commit, METH_NOARGS,
	       reservation_commit_doc),
	METHOD("discard", reservation_discard, METH_NOARGS,
	       reservation_discard_doc),
	{ NULL, NULL, 0, NULL },
};

static PyType_Slot reservation_slots[] = {
	SLOT(Py_tp_dealloc, reservation_dealloc),
	SLOT(Py_tp_methods, reservation_methods),
	SLOT(Py_bf_getbuffer, reservation_getbuffer),
	SLOT(Py_bf_releasebuffer, reservation_releasebuffer),
	{ 0, NULL },
};

static PyType_Spec reservation_spec = {
	.name = "kucomms._core._ring.Reservation",
	.basicsize = sizeof(ReservationObject),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.slots = reservation_slots,
};

/* ---- Borrow -------------------------------------------------------------- */

static void borrow_unpin(BorrowObject *self)
{
	ChannelObject *channel = self->channel;

	if (!self->pinned)
		return;
	self->pinned = 0;
	channel->users--;
	if (!forked(channel)) {
		kucomms_channel_unpin_rx(&self->pin);
		if (kucomms_channel_release(channel->channel))
			ring_doorbell(channel);
	}
	unmap_if_unused(channel);
}

PyDoc_STRVAR(borrow_release_doc,
"release() -> bool\n\nGive the bytes back. False when a view is still alive: they\n"
"are given back when it dies.");

static PyObject *borrow_release(BorrowObject *self, PyObject *unused)
{
	(void)unused;
	self->released = 1;
	if (self->exports)
		Py_RETURN_FALSE;
	borrow_unpin(self);
	Py_RETURN_TRUE;
}

static int borrow_getbuffer(BorrowObject *self, Py_buffer *view, int flags)
{
	if (self->released) {
		PyErr_SetString(PyExc_BufferError, "the borrow is over");
		return -1;
	}
	if (PyBuffer_FillInfo(view, (PyObject *)self, (void *)self->view.data,
			      (Py_ssize_t)self->view.length, 1, flags))
		return -1;
	self->exports++;
	return 0;
}

static void borrow_releasebuffer(BorrowObject *self, Py_buffer *view)
{
	(void)view;
	if (!--self->exports && self->released)
		borrow_unpin(self);
}

static void borrow_dealloc(BorrowObject *self)
{
	PyTypeObject *type = Py_TYPE(self);

	if (self->channel) {
		borrow_unpin(self);
		Py_DECREF(self->channel);
	}
	PyObject_Free(self);
	Py_DECREF(type);
}

static PyMethodDef borrow_methods[] = {
	METHOD("release", borrow_release, METH_NOARGS, borrow_release_doc),
	{ NULL, NULL, 0, NULL },
};

static PyMemberDef borrow_members[] = {
	{ "type", T_ULONGLONG, offsetof(BorrowObject, view.type), READONLY,
	  NULL },
	{ "id", T_ULONGLONG, offsetof(BorrowObject, view.id), READONLY, NULL },
	{ "user_value", T_ULONGLONG, offsetof(BorrowObject, view.user_value),
	  READONLY, NULL },
	{ "flags", T_UINT, offsetof(BorrowObject, view.flags), READONLY, NULL },
	{ NULL, 0, 0, 0, NULL },
};

static PyType_Slot borrow_slots[] = {
	SLOT(Py_tp_dealloc, borrow_dealloc),
	SLOT(Py_tp_methods, borrow_methods),
	SLOT(Py_tp_members, borrow_members),
	SLOT(Py_bf_getbuffer, borrow_getbuffer),
	SLOT(Py_bf_releasebuffer, borrow_releasebuffer),
	{ 0, NULL },
};

static PyType_Spec borrow_spec = {
	.name = "kucomms._core._ring.Borrow",
	.basicsize = sizeof(BorrowObject),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.slots = borrow_slots,
};

/* ---- Channel ------------------------------------------------------------- */

static PyObject *channel_new(PyTypeObject *type, PyObject *args,
			     PyObject *kwargs)
{
	unsigned long long address;
	ChannelObject *self;
	PyObject *module;

	if (kwargs && PyDict_Size(kwargs)) {
		PyErr_SetString(PyExc_TypeError, "no keyword arguments");
		return NULL;
	}
	if (!PyArg_ParseTuple(args, "K", &address))
		return NULL;
	module = PyType_GetModule(type);
	if (!module)
		return NULL;
	self = (ChannelObject *)PyType_GenericAlloc(type, 0);
	if (!self)
		return NULL;
	self->state = PyModule_GetState(module);
	self->channel = (struct kucomms_channel *)(uintptr_t)address;
	self->generation = fork_generation;
	self->loan_limit = 64;
	self->mapped = 1;
	all_add(self);
	return (PyObject *)self;
}

static int channel_traverse(ChannelObject *self, visitproc visit, void *arg)
{
	Py_VISIT(Py_TYPE(self));
	Py_VISIT(self->doorbell);
	Py_VISIT(self->room);
	return 0;
}

static int channel_clear(ChannelObject *self)
{
	Py_CLEAR(self->doorbell);
	Py_CLEAR(self->room);
	return 0;
}

static void channel_dealloc(ChannelObject *self)
{
	PyTypeObject *type = Py_TYPE(self);

	PyObject_GC_UnTrack(self);
	Py_CLEAR(self->doorbell);
	Py_CLEAR(self->room);
	if (self->mapped) {
		all_remove(self);
		kucomms_channel_unmap(self->channel);
	}
	if (self->channel) {
		if (!forked(self))
			pthread_mutex_destroy(&self->channel->lock);
		free(self->channel);
	}
	PyObject_GC_Del(self);
	Py_DECREF(type);
}

PyDoc_STRVAR(channel_attach_doc,
"attach(doorbell)\n\nMake the calling thread the channel's, and open it.\n"
"doorbell() is called, from any thread, when the peer has to be woken.");

static PyObject *channel_attach(ChannelObject *self, PyObject *doorbell)
{
	PyObject *old = self->doorbell;

	self->doorbell = Py_NewRef(doorbell);
	Py_XDECREF(old);
	self->owner = PyThread_get_thread_ident();
	self->attached = 1;
	self->open = 1;
	Py_RETURN_NONE;
}

PyDoc_STRVAR(channel_on_room_doc,
"on_room(callback)\n\ncallback() is called, from any thread, when bytes can be\n"
"reserved again that a dropped loan had kept: the peer does not ring for those.");

static PyObject *channel_on_room(ChannelObject *self, PyObject *callback)
{
	PyObject *old = self->room;

	self->room = Py_NewRef(callback);
	Py_XDECREF(old);
	Py_RETURN_NONE;
}

static PyObject *send_from(ChannelObject *self, PyObject *const *args,
			   Py_ssize_t nargs, int any_thread)
{
	enum status status;
	struct outgoing out;
	unsigned long flags;

	if (check_args("send", nargs, 5))
		return NULL;
	status = may_send(self, any_thread);
	if (status != OK)
		return from_status(status);
	flags = PyLong_AsUnsignedLong(args[4]);
	if (flags == (unsigned long)-1 && PyErr_Occurred())
		return NULL;
	if (outgoing_read(self->state, &out, args[0], args[1], args[2], args[3]))
		return NULL;
	/* reading the arguments may have run Python code that closed us */
	status = may_send(self, any_thread);
	if (status == OK) {
		begin_use(self);
		status = outgoing_put(self, &out, (uint32_t)flags);
		if (status == OK && kucomms_channel_publish(self->channel))
			ring_doorbell(self);
		end_use(self);
	}
	outgoing_clear(&out);
	return from_status(status);
}

PyDoc_STRVAR(channel_send_doc,
"send(data, type, id, user_value, flags) -> status\n\n"
"data: bytes-like or Message; None for a header value: the Message's, or 0.\n"
"OK, FULL, TOO_LARGE, CLOSED, PROTOCOL, WRONG_THREAD or FORKED.");

static PyObject *channel_send(ChannelObject *self, PyObject *const *args,
			      Py_ssize_t nargs)
{
	return send_from(self, args, nargs, 0);
}

PyDoc_STRVAR(channel_send_threadsafe_doc, "As send, from any thread.");

static PyObject *channel_send_threadsafe(ChannelObject *self,
					 PyObject *const *args,
					 Py_ssize_t nargs)
{
	return send_from(self, args, nargs, 1);
}

PyDoc_STRVAR(channel_send_many_doc,
"send_many(messages, start) -> (count, status)\n\n"
"Send the items of a list or tuple from index start on, until one cannot be\n"
"sent; count were sent, status says what is with the next one.");

static PyObject *channel_send_many(ChannelObject *self, PyObject *const *args,
				   Py_ssize_t nargs)
{
	enum status status = OK;
	Py_ssize_t start, at;

	if (check_args("send_many", nargs, 2))
		return NULL;
	start = PyLong_AsSsize_t(args[1]);
	if (start == -1 && PyErr_Occurred())
		return NULL;
	status = may_send(self, 0);
	if (status != OK)
		return Py_BuildValue("ni", (Py_ssize_t)0, (int)status);
	begin_use(self);
	for (at = start; status == OK; at++) {
		Py_ssize_t size = PySequence_Size(args[0]);
		struct outgoing out;
		PyObject *item;
		int err;

		if (size >= 0 && at >= size)
			break;
		item = size < 0 ? NULL : PySequence_GetItem(args[0], at);
		err = !item || outgoing_read(self->state, &out, item, Py_None,
					     Py_None, Py_None);
		Py_XDECREF(item);
		if (err) {
			/* what was sent comes first; the next call will raise */
			if (at == start) {
				end_use(self);
				return NULL;
			}
			PyErr_Clear();
			break;
		}
		status = may_send(self, 0);
		if (status == OK)
			status = outgoing_put(self, &out, 0);
		outgoing_clear(&out);
		if (status != OK)
			break;
	}
	if (at > start && kucomms_channel_publish(self->channel))
		ring_doorbell(self);
	end_use(self);
	return Py_BuildValue("ni", at - start, (int)status);
}

PyDoc_STRVAR(channel_reserve_doc,
"reserve(size, type, id, user_value) -> Reservation or status");

static PyObject *channel_reserve(ChannelObject *self, PyObject *const *args,
				 Py_ssize_t nargs)
{
	uint64_t type = 0, id = 0, user_value = 0;
	struct kucomms_frame *frame;
	ReservationObject *loan;
	enum status status;
	Py_ssize_t size;
	int err;

	if (check_args("reserve", nargs, 4))
		return NULL;
	status = may_send(self, 0);
	if (status != OK)
		return from_status(status);
	size = PyLong_AsSsize_t(args[0]);
	if (size == -1 && PyErr_Occurred())
		return NULL;
	if (size < 0) {
		PyErr_SetString(PyExc_OverflowError, "negative size");
		return NULL;
	}
	if (header_value(args[1], &type) || header_value(args[2], &id) ||
	    header_value(args[3], &user_value))
		return NULL;
	if ((uint64_t)size > UINT32_MAX)
		return from_status(TOO_LARGE);
	if (self->loans >= self->loan_limit)
		return from_status(TOO_MANY_LOANS);
	loan = PyObject_New(ReservationObject, self->state->reservation_type);
	if (!loan)
		return NULL;
	loan->channel = NULL;
	loan->exports = 0;
	loan->active = 0;
	loan->pinned = 0;
	err = kucomms_channel_reserve(self->channel, (uint32_t)size, 0, &frame,
				      &loan->pin);
	if (err) {
		Py_DECREF(loan);
		return from_status(status_of(err));
	}
	frame->type = type;
	frame->id = id;
	frame->user_value = user_value;
	loan->channel = (ChannelObject *)Py_NewRef((PyObject *)self);
	loan->frame = frame;
	loan->length = (uint32_t)size;
	loan->active = 1;
	loan->pinned = 1;
	self->loans++;
	self->users++;
	return (PyObject *)loan;
}

PyDoc_STRVAR(channel_receive_doc,
"receive(limit, budget, messages, replies) -> status\n\n"
"Append up to limit messages of together at most budget bytes of the ring to\n"
"the list messages, those with the reply flag to the list replies. OK also when\n"
"there were none; PROTOCOL after what came before the fault.");

/* A Message of what is in the ring; runs Python code. */
static PyObject *message_from(ChannelObject *self,
			      const struct kucomms_view *view)
{
	PyObject *data, *arguments, *message;

	data = PyBytes_FromStringAndSize((const char *)view->data,
					 (Py_ssize_t)view->length);
	if (!data)
		return NULL;
	arguments = Py_BuildValue("(NKKK)", data,
				  (unsigned long long)view->type,
				  (unsigned long long)view->id,
				  (unsigned long long)view->user_value);
	if (!arguments)
		return NULL;
	message = PyObject_Call((PyObject *)self->state->message_type,
				arguments, NULL);
	Py_DECREF(arguments);
	return message;
}

static PyObject *channel_receive(ChannelObject *self, PyObject *const *args,
				 Py_ssize_t nargs)
{
	struct kucomms_channel *channel = self->channel;
	enum status status;
	Py_ssize_t limit;
	long long budget;
	int failed = 0;

	if (check_args("receive", nargs, 4))
		return NULL;
	limit = PyLong_AsSsize_t(args[0]);
	if (limit == -1 && PyErr_Occurred())
		return NULL;
	budget = PyLong_AsLongLong(args[1]);
	if (budget == -1 && PyErr_Occurred())
		return NULL;
	status = may_receive(self);
	if (status != OK || self->receiving)
		return from_status(status);
	/*
	 * Making a message can run the garbage collector and so anything, also
	 * what closes this channel or receives from it.
	 */
	begin_use(self);
	self->receiving = 1;
	for (; limit > 0 && self->attached; limit--) {
		struct kucomms_view view;
		PyObject *message;
		int err;

		err = kucomms_channel_peek(channel, &view);
		if (err == -EAGAIN)
			break;
		if (err) {
			status = PROTOCOL;
			break;
		}
		/* Replies cost nothing: somebody waits for them. */
		if (!(view.flags & KUCOMMS_FLAG_REPLY))
			budget -= (long long)kucomms_frame_span(view.length);
		if (budget < 0 && !(view.flags & KUCOMMS_FLAG_REPLY))
			break;
		message = message_from(self, &view);
		failed = !message ||
			 PyList_Append(view.flags & KUCOMMS_FLAG_REPLY ?
				       args[3] : args[2], message);
		Py_XDECREF(message);
		if (failed)
			break;
		kucomms_channel_advance(channel, &view);
	}
	self->receiving = 0;
	if (kucomms_channel_release(channel))
		ring_doorbell(self);
	end_use(self);
	return failed ? NULL : from_status(status);
}

PyDoc_STRVAR(channel_borrow_doc,
"borrow() -> Borrow or status\n\nThe next message in place.");

static PyObject *channel_borrow(ChannelObject *self, PyObject *unused)
{
	struct kucomms_view view;
	BorrowObject *borrow;
	enum status status;
	int err;

	(void)unused;
	status = may_receive(self);
	if (status != OK)
		return from_status(status);
	if (self->receiving)
		return from_status(EMPTY);
	borrow = PyObject_New(BorrowObject, self->state->borrow_type);
	if (!borrow)
		return NULL;
	borrow->channel = NULL;
	borrow->exports = 0;
	borrow->released = 0;
	borrow->pinned = 0;
	/* allocating may have run anything */
	status = may_receive(self);
	if (status != OK) {
		Py_DECREF(borrow);
		return from_status(status);
	}
	err = kucomms_channel_peek(self->channel, &view);
	if (err) {
		Py_DECREF(borrow);
		/* what was skipped on the way */
		if (kucomms_channel_release(self->channel))
			ring_doorbell(self);
		return from_status(err == -EAGAIN ? EMPTY : PROTOCOL);
	}
	borrow->channel = (ChannelObject *)Py_NewRef((PyObject *)self);
	borrow->view = view;
	borrow->pinned = 1;
	self->users++;
	kucomms_channel_borrow(self->channel, &view, &borrow->pin);
	return (PyObject *)borrow;
}

PyDoc_STRVAR(channel_park_receive_doc,
"park_receive() -> bool\n\nAsk for the doorbell when a message comes. True when\n"
"there is something already: look instead of waiting.");

static PyObject *channel_park_receive(ChannelObject *self, PyObject *unused)
{
	(void)unused;
	if (may_receive(self) != OK)
		Py_RETURN_FALSE;
	return PyBool_FromLong(kucomms_channel_park_rx(self->channel));
}

PyDoc_STRVAR(channel_park_send_doc,
"park_send(size) -> bool\n\nAsk for the doorbell when there is room. True when\n"
"there is already: try again instead of waiting. Any thread.");

static PyObject *channel_park_send(ChannelObject *self, PyObject *size)
{
	unsigned long long length = PyLong_AsUnsignedLongLong(size);
	int must_ring;

	if (length == (unsigned long long)-1 && PyErr_Occurred())
		return NULL;
	if (may_send(self, 1) != OK || length > UINT32_MAX)
		Py_RETURN_TRUE;
	begin_use(self);
	must_ring = kucomms_channel_park_tx(self->channel, (uint32_t)length);
	if (must_ring == 1)
		ring_doorbell(self);
	end_use(self);
	return PyBool_FromLong(must_ring == -EAGAIN);
}

PyDoc_STRVAR(channel_unpark_send_doc,
"unpark_send()\n\nTell the peer that nobody waits for room any more. Any thread.");

static PyObject *channel_unpark_send(ChannelObject *self, PyObject *unused)
{
	(void)unused;
	if (may_send(self, 1) == OK)
		kucomms_channel_unpark_tx(self->channel);
	Py_RETURN_NONE;
}

PyDoc_STRVAR(channel_stop_sending_doc,
"stop_sending(state)\n\nNo more sends from here. With a state other than 0, tell\n"
"the peer that nothing more comes, and ring.");

static PyObject *channel_stop_sending(ChannelObject *self, PyObject *state)
{
	unsigned long value = PyLong_AsUnsignedLong(state);

	if (value == (unsigned long)-1 && PyErr_Occurred())
		return NULL;
	self->open = 0;
	if (value && !forked(self) && self->mapped && self->attached) {
		kucomms_channel_close(self->channel, (uint32_t)value);
		ring_doorbell(self);
	}
	Py_RETURN_NONE;
}

PyDoc_STRVAR(channel_finish_doc,
"finish()\n\nThe peer is gone for good: what it left half-written is skipped.");

static PyObject *channel_finish(ChannelObject *self, PyObject *unused)
{
	(void)unused;
	self->channel->rx.final = 1;
	Py_RETURN_NONE;
}

PyDoc_STRVAR(channel_unmap_doc,
"unmap()\n\nNo more use. The memory goes as soon as no loan or borrow is in use.");

static PyObject *channel_unmap(ChannelObject *self, PyObject *unused)
{
	(void)unused;
	self->open = 0;
	self->attached = 0;
	self->unmap_wanted = 1;
	Py_CLEAR(self->doorbell);
	Py_CLEAR(self->room);
	unmap_if_unused(self);
	Py_RETURN_NONE;
}

static int readable(const ChannelObject *self)
{
	return self->mapped && self->attached && !forked(self);
}

static PyObject *channel_get_peer_state(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLong(readable(self) ?
		kucomms_ring_peer_state(&self->channel->rx) : 0);
}

static PyObject *channel_get_peer_starves(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyBool_FromLong(readable(self) &&
			       kucomms_channel_peer_starves(self->channel));
}

static PyObject *channel_get_tx_avail(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong(readable(self) ?
		kucomms_channel_tx_avail(self->channel) : 0);
}

static PyObject *channel_get_tx_free(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong(readable(self) && self->open ?
		kucomms_channel_tx_free(self->channel) : 0);
}

static PyObject *channel_get_rx_avail(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong(readable(self) ?
		kucomms_channel_rx_avail(self->channel) : 0);
}

PyDoc_STRVAR(channel_counters_doc,
"counters() -> tuple\n\nmessages sent, bytes sent, messages received, bytes\n"
"received, full waits, doorbells rung, doorbells suppressed, protocol errors,\n"
"tx high water, rx high water.");

static PyObject *channel_counters(ChannelObject *self, PyObject *unused)
{
	struct kucomms_channel *channel = self->channel;
	unsigned long long chances = channel->publishes + channel->releases;

	(void)unused;
	return Py_BuildValue("(KKKKKKKKKK)",
			     (unsigned long long)channel->messages_sent,
			     (unsigned long long)channel->bytes_sent,
			     (unsigned long long)channel->messages_received,
			     (unsigned long long)channel->bytes_received,
			     (unsigned long long)channel->full_waits,
			     (unsigned long long)channel->doorbells_rung,
			     chances - channel->doorbells_rung,
			     (unsigned long long)channel->protocol_errors,
			     (unsigned long long)channel->tx.high_water,
			     (unsigned long long)channel->rx.high_water);
}

static PyObject *channel_get_address(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong((uintptr_t)self->channel);
}

static PyObject *channel_get_ring_size(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong(self->channel->ring_size);
}

static PyObject *channel_get_forked(ChannelObject *self, void *unused)
{
	(void)unused;
	return PyBool_FromLong(forked(self));
}

static PyMethodDef channel_methods[] = {
	METHOD("attach", channel_attach, METH_O, channel_attach_doc),
	METHOD("on_room", channel_on_room, METH_O, channel_on_room_doc),
	METHOD("send", channel_send, METH_FASTCALL, channel_send_doc),
	METHOD("send_threadsafe", channel_send_threadsafe, METH_FASTCALL,
	       channel_send_threadsafe_doc),
	METHOD("send_many", channel_send_many, METH_FASTCALL,
	       channel_send_many_doc),
	METHOD("reserve", channel_reserve, METH_FASTCALL, channel_reserve_doc),
	METHOD("receive", channel_receive, METH_FASTCALL, channel_receive_doc),
	METHOD("borrow", channel_borrow, METH_NOARGS, channel_borrow_doc),
	METHOD("park_receive", channel_park_receive, METH_NOARGS,
	       channel_park_receive_doc),
	METHOD("park_send", channel_park_send, METH_O, channel_park_send_doc),
	METHOD("unpark_send", channel_unpark_send, METH_NOARGS,
	       channel_unpark_send_doc),
	METHOD("stop_sending", channel_stop_sending, METH_O,
	       channel_stop_sending_doc),
	METHOD("finish", channel_finish, METH_NOARGS, channel_finish_doc),
	METHOD("unmap", channel_unmap, METH_NOARGS, channel_unmap_doc),
	METHOD("counters", channel_counters, METH_NOARGS, channel_counters_doc),
	{ NULL, NULL, 0, NULL },
};

#define GETTER(name, doc) \
	{ #name, (getter)channel_get_##name, NULL, doc, NULL }

static PyGetSetDef channel_getset[] = {
	GETTER(peer_state, "what the peer says of itself: 0 open"),
	GETTER(peer_starves, "after parking: the peer waits for what is borrowed"),
	GETTER(tx_avail, "bytes sent and not yet released by the peer"),
	GETTER(tx_free, "bytes that can be sent now, headers included"),
	GETTER(rx_avail, "bytes that wait to be read, headers included"),
	GETTER(address, "of struct kucomms_channel, for _setup"),
	GETTER(ring_size, "bytes of each ring"),
	GETTER(forked, "whether this is a child of the process that made it"),
	{ NULL, NULL, NULL, NULL, NULL },
};

PyDoc_STRVAR(channel_doc,
"Channel(address)\n\n"
"Takes over a struct kucomms_channel that _setup made. Every method but\n"
"send_threadsafe and the two for parking sends belongs to the thread of attach().");

static PyType_Slot channel_slots[] = {
	SLOT(Py_tp_new, channel_new),
	SLOT(Py_tp_dealloc, channel_dealloc),
	SLOT(Py_tp_traverse, channel_traverse),
	SLOT(Py_tp_clear, channel_clear),
	SLOT(Py_tp_methods, channel_methods),
	SLOT(Py_tp_getset, channel_getset),
	{ Py_tp_doc, (void *)channel_doc },
	{ 0, NULL },
};

static PyType_Spec channel_spec = {
	.name = "kucomms._core._ring.Channel",
	.basicsize = sizeof(ChannelObject),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
	.slots = channel_slots,
};

/* ---- module -------------------------------------------------------------- */

PyDoc_STRVAR(configure_doc,
"configure(message_type)\n\nThe class of received messages: called with data, type,\n"
"id, user_value, which are its attributes as well.");

static PyObject *configure(PyObject *module, PyObject *message_type)
{
	struct module_state *state = PyModule_GetState(module);
	PyTypeObject *old = state->message_type;

	if (!PyType_Check(message_type)) {
		PyErr_SetString(PyExc_TypeError, "not a type");
		return NULL;
	}
	state->message_type = (PyTypeObject *)Py_NewRef(message_type);
	Py_XDECREF(old);
	Py_RETURN_NONE;
}

PyDoc_STRVAR(ring_socket_doc,
"ring_socket(fd) -> errno\n\n"
"Write the doorbell byte, never blocking. Keeps the GIL, so that no other thread\n"
"can close fd and open another one under the same number in between. A full\n"
"socket is a success: the peer has a byte to wake up for.");

static PyObject *ring_socket(PyObject *module, PyObject *fd)
{
	static const char bell = 1;
	long number = PyLong_AsLong(fd);

	(void)module;
	if (number == -1 && PyErr_Occurred())
		return NULL;
	while (send((int)number, &bell, 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
		if (errno == EINTR)
			continue;
		if (errno == EAGAIN || errno == EWOULDBLOCK)
			break;
		return PyLong_FromLong(errno);
	}
	return PyLong_FromLong(0);
}

PyDoc_STRVAR(ring_device_doc,
"ring_device(fd) -> errno\n\n"
"Ring the kernel's doorbell. Keeps the GIL, as ring_socket().");

static PyObject *ring_device(PyObject *module, PyObject *fd)
{
	long number = PyLong_AsLong(fd);

	(void)module;
	if (number == -1 && PyErr_Occurred())
		return NULL;
	return PyLong_FromLong(ioctl((int)number, KUCOMMS_IOC_KICK) ? errno : 0);
}

PyDoc_STRVAR(drain_socket_doc,
"drain_socket(fd) -> status\n\n"
"Take the doorbells off a socket, never blocking. OK: it is empty. FULL: there is\n"
"more than can be read in one go. CLOSED: it has ended. PROTOCOL: there was\n"
"something else than doorbells.");

static PyObject *drain_socket(PyObject *module, PyObject *fd)
{
	long number = PyLong_AsLong(fd);
	char bells[4096];
	ssize_t size, at;
	int round;

	(void)module;
	if (number == -1 && PyErr_Occurred())
		return NULL;
	for (round = 0; round < 64; round++) {
		size = recv((int)number, bells, sizeof(bells), MSG_DONTWAIT);
		if (size < 0 && errno == EINTR)
			continue;
		if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
			return from_status(OK);
		if (size <= 0)
			return from_status(CLOSED);
		for (at = 0; at < size; at++)
			if (bells[at] != 1)
				return from_status(PROTOCOL);
	}
	return from_status(FULL);
}

static PyMethodDef module_methods[] = {
	METHOD("drain_socket", drain_socket, METH_O, drain_socket_doc),
	METHOD("configure", configure, METH_O, configure_doc),
	METHOD("ring_device", ring_device, METH_O, ring_device_doc),
	METHOD("ring_socket", ring_socket, METH_O, ring_socket_doc),
	{ NULL, NULL, 0, NULL },
};

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
	PyTypeObject *type =
		(PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);

	if (type && PyModule_AddType(module, type))
		Py_CLEAR(type);
	return type;
}

static int module_exec(PyObject *module)
{
	struct module_state *state = PyModule_GetState(module);
	static int atfork_done;
	static const struct { const char *name; long value; } constants[] = {
		{ "OK", OK },
		{ "FULL", FULL },
		{ "EMPTY", EMPTY },
		{ "TOO_LARGE", TOO_LARGE },
		{ "CLOSED", CLOSED },
		{ "PROTOCOL", PROTOCOL },
		{ "WRONG_THREAD", WRONG_THREAD },
		{ "FORKED", FORKED },
		{ "TOO_MANY_LOANS", TOO_MANY_LOANS },
		{ "FLAG_REPLY", KUCOMMS_FLAG_REPLY },
		{ "STATE_OPEN", KUCOMMS_STATE_OPEN },
		{ "STATE_CLOSED", KUCOMMS_STATE_CLOSED },
		{ "STATE_SHUTDOWN", KUCOMMS_STATE_SHUTDOWN },
		{ "HEADER_SIZE", (long)KUCOMMS_HEADER_SIZE },
	};
	size_t i;

	if (!atfork_done) {
		if (pthread_atfork(before_fork, after_fork_parent,
				   after_fork_child)) {
			PyErr_NoMemory();
			return -1;
		}
		atfork_done = 1;
	}
	state->channel_type = add_type(module, &channel_spec);
	state->reservation_type = add_type(module, &reservation_spec);
	state->borrow_type = add_type(module, &borrow_spec);
	state->name_data = PyUnicode_InternFromString("data");
	state->name_type = PyUnicode_InternFromString("type");
	state->name_id = PyUnicode_InternFromString("id");
	state->name_user_value = PyUnicode_InternFromString("user_value");
	if (!state->channel_type || !state->reservation_type ||
	    !state->borrow_type || !state->name_data || !state->name_type ||
	    !state->name_id || !state->name_user_value)
		return -1;
	for (i = 0; i < sizeof(constants) / sizeof(*constants); i++)
		if (PyModule_AddIntConstant(module, constants[i].name,
					    constants[i].value))
			return -1;
	return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
	struct module_state *state = PyModule_GetState(module);

	Py_VISIT(state->channel_type);
	Py_VISIT(state->reservation_type);
	Py_VISIT(state->borrow_type);
	Py_VISIT(state->message_type);
	return 0;
}

static int module_clear(PyObject *module)
{
	struct module_state *state = PyModule_GetState(module);

	Py_CLEAR(state->channel_type);
	Py_CLEAR(state->reservation_type);
	Py_CLEAR(state->borrow_type);
	Py_CLEAR(state->message_type);
	Py_CLEAR(state->name_data);
	Py_CLEAR(state->name_type);
	Py_CLEAR(state->name_id);
	Py_CLEAR(state->name_user_value);
	return 0;
}

static PyModuleDef_Slot module_slots[] = {
	SLOT(Py_mod_exec, module_exec),
	{ 0, NULL },
};

static struct PyModuleDef module_def = {
	PyModuleDef_HEAD_INIT,
	.m_name = "kucomms._core._ring",
	.m_doc = "What runs per message; see the head of _ring.c.",
	.m_size = sizeof(struct module_state),
	.m_methods = module_methods,
	.m_slots = module_slots,
	.m_traverse = module_traverse,
	.m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__ring(void);

PyMODINIT_FUNC PyInit__ring(void)
{
	return PyModuleDef_Init(&module_def);
}
