package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// ErrMainThread is Do's refusal to teleport the main thread. The runtime can't
// destroy that one: if it failed to come back it would stay in the pod for ever
// (golang/go#34031). Lock it away with runtime.LockOSThread in an init function.
var ErrMainThread = errors.New("the main thread may not enter a network namespace: lock it in init")

// ErrStranded says that a thread could not come back. The thread was destroyed;
// the process is whole, and the next visit gets another thread.
var ErrStranded = errors.New("thread could not come back and was destroyed")

// Visit is what happened on one trip, for whoever wants to narrate it
// afterwards: inside, nothing may be printed, because a slow terminal would
// keep the thread in the pod.
type Visit struct {
	TID                int // the thread that went
	Home, Inside, Back ID  // where it was before, in between and, read from the kernel, afterwards
	Enter, Work, Leave time.Duration
}

// Do runs fn on a thread that is inside n, and returns when the thread is home
// again. n stays the caller's and must stay open until then.
//
// fn must be short: make and bind sockets, or open a netlink socket. It may not
// start goroutines, wait for a peer, or touch the thread's lock. Entering needs
// CAP_SYS_ADMIN in the user namespaces of both the pod and the process
// (setns(2)). An error is fn's own, or says which step of the trip failed.
func (n *NS) Do(fn func() error) (Visit, error) {
	home, err := Home()
	if err != nil {
		return Visit{}, err
	}
	// A goroutine of its own, because its thread may have to die with it.
	done := make(chan trip, 1)
	go teleport(home, n, fn, done)
	t := <-done
	return t.Visit, t.err
}

type trip struct {
	Visit
	err error
}

// teleport is one trip, from top to bottom.
func teleport(home, pod *NS, fn func() error, done chan<- trip) {
	// A namespace belongs to a thread, not to the process. Until the lock is
	// undone, this goroutine is all that runs on this thread.
	runtime.LockOSThread()

	t := trip{Visit: Visit{TID: unix.Gettid(), Home: home.id, Inside: pod.id}}
	if t.TID == unix.Getpid() {
		runtime.UnlockOSThread()
		t.err = ErrMainThread
		done <- t
		return
	}

	start := time.Now()
	if err := unix.Setns(pod.fd, unix.CLONE_NEWNET); err != nil {
		// Never left: the thread is clean.
		runtime.UnlockOSThread()
		t.err = fmt.Errorf("enter %v: %w", pod.id, os.NewSyscallError("setns", err))
		done <- t
		return
	}
	inside := time.Now()

	// From here on the thread is in the pod. What fn opens, stays there.
	t.err = fn()

	leaving := time.Now()
	err := unix.Setns(home.fd, unix.CLONE_NEWNET)
	if err != nil {
		err = os.NewSyscallError("setns", err)
	} else {
		t.Back, err = threadNS()
	}
	if err == nil && t.Back != home.id {
		err = fmt.Errorf("found itself in %v", t.Back)
	}
	t.Enter, t.Work, t.Leave = inside.Sub(start), leaving.Sub(inside), time.Since(leaving)

	if err != nil {
		// Still in the pod, or nobody knows where. The lock is kept: a
		// goroutine that ends locked makes the runtime destroy its thread, so
		// nothing else ever runs on it.
		err = fmt.Errorf("%w: from %v to %v: %w", ErrStranded, pod.id, home.id, err)
		if t.err != nil {
			err = fmt.Errorf("%w; before that: %w", err, t.err)
		}
		t.err = err
		done <- t
		return
	}
	runtime.UnlockOSThread()
	done <- t
}

// threadNS asks the kernel where the calling thread is.
func threadNS() (ID, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return ID{}, os.NewSyscallError("stat /proc/thread-self/ns/net", err)
	}
	return ID{Dev: uint64(st.Dev), Ino: st.Ino}, nil
}

// Probe tells whether this process may enter network namespaces at all, by the
// harmless version of the real thing: a thread enters the namespace it is in.
func Probe() error {
	home, err := Home()
	if err != nil {
		return err
	}
	_, err = home.Do(func() error { return nil })
	return err
}
