package inpod

import (
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Answer is what a connection gets that has nowhere to go: the seed's words. These
// are 15008 without a tunnel, and in the seed's mode what nobody has redirected.
const Answer = "ok\n"

const (
	lingerFor   = time.Second // how long a client may take to hang up
	lingerBytes = 64 << 10    // how much it may say meanwhile
	lingerMost  = 512         // how many may take their time at once
)

// answerer answers connections without ever being held up by one.
type answerer struct {
	slots chan struct{}
	wg    sync.WaitGroup

	mu     sync.Mutex
	closed bool
	open   map[*os.File]*pod
}

func newAnswerer() *answerer {
	return &answerer{slots: make(chan struct{}, lingerMost), open: make(map[*os.File]*pod)}
}

// answer answers the connection fd, which it owns, and returns at once.
func (a *answerer) answer(owner *pod, fd int) {
	// Three bytes into an empty socket buffer: this can't block, and an error
	// means that the client is gone.
	_, err := unix.Write(fd, []byte(Answer))
	if err != nil || unix.Shutdown(fd, unix.SHUT_WR) != nil {
		unix.Close(fd)
		return
	}
	// To close with unread bytes resets the connection, and a reset can
	// overtake our answer in the client's buffers. So wait for the client to
	// hang up; but only so long, only so much, and only so many at once.
	select {
	case a.slots <- struct{}{}:
	default:
		unix.Close(fd)
		return
	}
	f := os.NewFile(uintptr(fd), "connection")
	a.mu.Lock()
	if a.closed || owner.stopped.Load() {
		a.mu.Unlock()
		f.Close()
		<-a.slots
		return
	}
	f.SetReadDeadline(time.Now().Add(lingerFor)) // here, not to undo what close does
	a.open[f] = owner
	a.wg.Add(1)
	a.mu.Unlock()
	go a.linger(f)
}

// linger waits for the client to hang up and closes f.
func (a *answerer) linger(f *os.File) {
	defer a.wg.Done()
	io.Copy(io.Discard, io.LimitReader(f, lingerBytes))
	a.mu.Lock()
	delete(a.open, f)
	a.mu.Unlock()
	f.Close()
	<-a.slots
}

// cut ends the connections of one pod. They close in a moment.
func (a *answerer) cut(owner *pod) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for f, p := range a.open {
		if p == owner {
			f.SetReadDeadline(time.Unix(1, 0))
		}
	}
}

// waitIdle waits until all connections have ended by themselves, so long at most.
func (a *answerer) waitIdle(most time.Duration) {
	idle := make(chan struct{})
	go func() {
		a.wg.Wait()
		close(idle)
	}()
	select {
	case <-idle:
	case <-time.After(most):
	}
}

// close cuts every connection and waits until they are closed.
func (a *answerer) close() {
	a.mu.Lock()
	a.closed = true
	for f := range a.open {
		f.SetReadDeadline(time.Unix(1, 0))
	}
	a.mu.Unlock()
	a.wg.Wait()
}
