# SPDX-License-Identifier: Apache-2.0
"""What a signal must not tear, and what a fork must not share: work that is wholly done or undone, handles that belong to one process.

Python runs signal handlers in the main thread, between any two steps of it. So work that must not be left half-way is done in a thread of
its own, and the main thread waits for it here, in C: handlers run meanwhile, and what they raise is raised when the work has ended. It
knows neither disks nor files, nor what the work is.
"""

import logging
import os
import sys
import threading
import time
import weakref
from _thread import start_new_thread

from cpython.exc cimport PyErr_CheckSignals

from fvd.errors import Forked

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <pthread.h>
    #include <semaphore.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    static __thread void *fvd_work;         /* what this thread is doing, borrowed */
    static __thread int fvd_never_waits;
    static volatile int fvd_process = 1;

    static void fvd_forked(void) { fvd_process++; }
    static int fvd_watch_forks(void) { return pthread_atfork(NULL, NULL, fvd_forked); }
    /* Of the system's kind: Python's own question is asked in Python, where a handler could run. */
    static int fvd_is_main_thread(void) { return syscall(SYS_gettid) == getpid(); }
    static int fvd_wait(sem_t *semaphore, long milliseconds) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_sec += milliseconds / 1000;
        until.tv_nsec += milliseconds % 1000 * 1000000;
        if (until.tv_nsec >= 1000000000) {
            until.tv_nsec -= 1000000000;
            until.tv_sec++;
        }
        return sem_clockwait(semaphore, CLOCK_MONOTONIC, &until) == 0 ? 0 : errno;
    }
    """
    void *fvd_work
    int fvd_never_waits
    int fvd_process
    int fvd_watch_forks() noexcept nogil
    int fvd_is_main_thread() noexcept nogil
    int fvd_wait(sem_t *semaphore, long milliseconds) noexcept nogil

cdef extern from "<semaphore.h>" nogil:
    int sem_init(sem_t *, int, unsigned int)
    int sem_destroy(sem_t *)
    int sem_post(sem_t *)
    int sem_wait(sem_t *)

cdef extern from "Python.h":
    int PyErr_ResourceWarning(object source, Py_ssize_t stack_level, const char *format, ...) except -1

cdef enum:
    LOOK_MS = 100           # a signal that another thread has received wakes nobody here
    FORK_MS = 200           # a fork waits so long at most for what is just being opened: that may be a device that hangs
    FINALIZER_MS = 10000    # a collected handle is waited for so long: what it waits for may be held by whoever collects it

log = logging.getLogger(__name__)


class Interrupted(BaseException):
    """Work that has been asked to stop has stopped. Never leaves `whole`, nor whoever else has asked."""


cdef int process() noexcept nogil:
    return fvd_process


cdef int asked_to_stop() noexcept nogil:
    return 0 if fvd_work == NULL else (<Work>fvd_work).asked


cdef bint is_work() noexcept nogil:
    return fvd_work != NULL


# --- Work -------------------------------------------------------------------------------------------------------------------------

cdef class Work:
    """One piece of work: who waits for it may ask it to stop, and it stops where it can be undone or left (`checkpoint`)."""

    def __cinit__(self):
        sem_init(&self.done, 0, 0)
        sem_init(&self.answered, 0, 0)

    def __init__(self, function):
        self.function = function

    def __dealloc__(self):
        sem_destroy(&self.done)
        sem_destroy(&self.answered)

    def ask(self):
        """Stop where you can; from any thread. A second time: wait for nothing that only time would end."""
        self.asked += 1

    def run(self):
        """Does it in this thread, once. Returns what the function returns and raises what it raises. The function is let go of before
        anybody hears of its end: a handle that only this knew is collected here."""
        cdef void *before = fvd_work
        global fvd_work
        function, self.function = self.function, None
        fvd_work = <void *>self
        try:
            return function()
        finally:
            function = None
            fvd_work = before
            self.ended = True

    def _perform(self):
        try:
            self.result = self.run()
        except BaseException as error:
            self.error = error
        sem_post(&self.done)

    def _start(self, name):
        """In a thread that no handler interrupts: making a proper one takes many steps."""
        try:
            threading.Thread(target=self._perform, name=name, daemon=True).start()
        except RuntimeError:    # no second one is to be had: this one does it
            self._perform()

    cdef int begin(self, str name) except -1:
        start_new_thread(self._start, (name,))
        return 0

    cdef object wait(self):
        """Until it has ended. Returns what a signal handler has raised meanwhile; then it was asked to stop."""
        cdef int missed
        interruption = None
        self.waited_for = True
        while True:
            with nogil:
                missed = fvd_wait(&self.done, LOOK_MS)
            try:
                PyErr_CheckSignals()    # in the end too: a signal that came with it finds the work undone, not its result lost
            except BaseException as error:
                interruption = interruption or error
                self.asked += 1
            if missed == 0 and self.errand is None:
                return interruption
            if missed == 0:
                self._run_errand()

    def _run_errand(self):
        errand, self.errand = self.errand, None
        errand.run()
        sem_post(&self.answered)

    cdef bint wait_for(self, double seconds) noexcept:
        """Whether it has ended within this time. No handler runs, and nobody's errands are run."""
        cdef int missed = 1
        cdef int left = <int>(seconds * 1000 / LOOK_MS)
        while missed and left > 0:
            with nogil:
                missed = fvd_wait(&self.done, LOOK_MS)
            left -= 1
        return missed == 0

    cdef object conclude(self):
        """The end of it: what came of it, or its error."""
        result, error, self.result, self.error = self.result, self.error, None, None
        if error is not None:
            try:
                raise error
            finally:
                error = None        # or it would hold the frame that holds it
        return result


class _Errand:
    """What the caller is to run for the work, and what came of it."""

    def __init__(self, callback, arguments):
        self.callback = callback
        self.arguments = arguments
        self.result = self.error = None

    def run(self):
        try:
            self.result = self.callback(*self.arguments)
        except BaseException as error:
            self.error = error


def whole(function, undo=None, name="fvd-work"):
    """`function()`, of which no signal handler leaves half: a handler that raises has it stop at its next checkpoint, and what it raised is
    raised here when it has ended. If it had been done by then, `undo(result)` is called first.

    Called in another thread than the main one it is just called: handlers do not run there.
    """
    cdef Work work
    if not fvd_is_main_thread() or fvd_work != NULL:
        return function()
    work = Work(function)
    try:
        work.begin(name)
    except RuntimeError:        # no thread is to be had: better so than not at all
        return work.run()
    interruption = work.wait()
    if interruption is None:
        return work.conclude()
    try:
        if work.error is None and undo is not None:
            made = work.result
            work = Work(lambda: undo(made))
            work.begin(name)
            work.wait()
        if work.error is not None and not isinstance(work.error, Interrupted) and work.error is not interruption:
            log.info("interrupted, and then: %s", work.error)
        raise interruption
    finally:
        interruption = work = made = None


def checkpoint():
    """Here work may be left: it is about to wait, or to begin something long. Raises Interrupted when it has been asked to stop; once for
    each time, for then it is undone, which is not to be left half-way either."""
    cdef Work work
    if asked_to_stop():
        work = <Work>fvd_work
        if work.asked > work.heard:
            work.heard = work.asked
            raise Interrupted


def times_asked():
    """How often this thread's work has been asked to stop."""
    return asked_to_stop()


def in_caller(callback):
    """The same function, called in the thread of who called `whole`, wherever it is called from: a user's own, with its own threads."""
    def call(*arguments):
        cdef Work work
        if fvd_work == NULL or not (<Work>fvd_work).waited_for:
            return callback(*arguments)
        work = <Work>fvd_work
        errand = _Errand(callback, arguments)
        work.errand = errand
        sem_post(&work.done)
        with nogil:
            while sem_wait(&work.answered) != 0:
                pass
        if errand.error is not None:
            raise errand.error
        return errand.result

    return call


# --- Handles ----------------------------------------------------------------------------------------------------------------------

cdef class Handle:
    """Something open in this process: a context manager that is closed wholly or not at all, tells when it is forgotten, and refuses to
    work in a child after fork. Its methods are C: no handler runs between their call and what they do."""

    cdef object _title, _end, _undone
    cdef int _process
    cdef bint _over

    def _begin(self, title, end, undone=None):
        """From now on it is open. `end()` closes it, and is as good as done when it has raised; it must not know this object."""
        self._title = title
        self._end = end
        self._undone = undone
        self._process = fvd_process

    def _check(self):
        """Raises Forked in another process."""
        if self._process != fvd_process:
            raise Forked(f"{self._title} was opened by the process that this one was forked from, and is that one's; open it here")

    def close(self):
        self._check()
        self._close()

    def _close(self):
        whole(self._ending, None, "fvd-close")

    def _ending(self):
        try:
            self._end()
        finally:
            self._over = True

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self._process == fvd_process:
            self._close()

    def __del__(self):
        cdef Work work
        cdef bytes title
        if self._end is None or self._over or self._process != fvd_process or sys.is_finalizing():
            return
        self._over = True
        try:
            title = str(self._title).encode()
            PyErr_ResourceWarning(self, 1, b"%s was not closed; close it, or use it in a with statement", <const char *> title)
        except BaseException as warning:    # as an error, if the user wants that: it can be raised nowhere
            sys.unraisablehook(_Unraisable(warning, title.decode()))
        work = Work(_Forgotten(self._title, self._end))
        try:
            work.begin("fvd-close")
        except BaseException as error:
            log.error("%s was not closed, and cannot be closed now: %s", self._title, error)
            return
        if not fvd_never_waits:
            work.wait_for(FINALIZER_MS / 1000)


class _Unraisable:
    """What sys.unraisablehook is given."""

    def __init__(self, error, title):
        self.exc_type = type(error)
        self.exc_value = error
        self.exc_traceback = error.__traceback__
        self.err_msg = f"{title}: not closed"
        self.object = None


class _Forgotten:
    """Closes what somebody has forgotten to close."""

    def __init__(self, title, end):
        self._title = title
        self._end = end

    def __call__(self):
        try:
            self._end()
        except Exception as error:
            log.error("%s was not closed, and closing it failed: %s", self._title, error)


cdef class Here:
    """Which process something was made in."""

    cdef int _process

    def __cinit__(self):
        self._process = fvd_process

    @property
    def is_here(self):
        return self._process == fvd_process

    def check(self, title):
        """Raises Forked in another process."""
        if self._process != fvd_process:
            raise Forked(f"{title} of the process that this one was forked from cannot be used here; open it here")


def never_wait():
    """This thread serves others: a forgotten handle that is collected in it is closed by another one."""
    global fvd_never_waits
    fvd_never_waits = 1


# --- Forks ------------------------------------------------------------------------------------------------------------------------

cdef class BetweenForks:
    """While one thread opens a descriptor and tells of it (`keep`), no other forks: a child would hold what nobody there knows of. Not
    longer than FORK_MS: the child of a program whose device hangs is worth more than one descriptor."""

    cdef int opening, forking   # changed with the interpreter's lock held, and nowhere in between

    def __enter__(self):
        cdef int left = FORK_MS
        while self.forking and left > 0:
            time.sleep(0.001)
            left -= 1
        self.opening += 1

    def __exit__(self, *_):
        self.opening -= 1

    def before(self):
        cdef int left = FORK_MS
        self.forking += 1
        while self.opening and left > 0:
            time.sleep(0.001)
            left -= 1

    def after(self):
        self.forking -= 1

    def in_child(self):
        self.opening = self.forking = 0


between_forks = BetweenForks()

_kept = {}          # by the id of what was opened: a weak reference to it, and how it tells its descriptors


def keep(thing, descriptors):
    """A child after os.fork() gives the descriptors of this up, `descriptors(thing)`, negative ones excepted. It must wait for no lock: a
    thread that is not there any more may hold it."""
    key = id(thing)
    _kept[key] = (weakref.ref(thing, lambda gone: _kept.pop(key, None)), descriptors)


class Descriptors(list):
    """Open descriptors, which a child after fork gives up. Whoever opens one puts it in at once."""

    def __init__(self):
        keep(self, list)

    def close(self):
        """Again is fine."""
        while self:
            os.close(self.pop())


def _in_child():
    """Each descriptor becomes one of /dev/null: whoever still knows its number closes nothing of anybody else's."""
    kept = list(_kept.values())
    _kept.clear()
    if not kept:
        return
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:             # no descriptor is left: the first gives up its own
        null = -1
    for reference, descriptors in kept:
        thing = reference()
        if thing is None:
            continue
        try:
            for fd in descriptors(thing):
                if fd >= 0:
                    _let_go(fd, null)
        except Exception:   # the others are to be let go of all the same
            log.debug("something of the parent's could not be let go of", exc_info=True)
    if null >= 0:
        os.close(null)


def _let_go(fd, null):
    if null >= 0:
        os.dup2(null, fd, inheritable=False)
    else:
        os.close(fd)


if fvd_watch_forks() != 0:
    raise MemoryError("no memory to watch for forks")
os.register_at_fork(after_in_child=_in_child)
os.register_at_fork(before=between_forks.before, after_in_parent=between_forks.after, after_in_child=between_forks.in_child)
