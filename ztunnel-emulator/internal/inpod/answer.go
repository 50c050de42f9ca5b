package inpod

import (
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Answer is what every connection gets until traffic flows: the seed's words.
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
	open   map[*os.File]struct{}
}

func newAnswerer() *answerer {
	return &answerer{slots: make(chan struct{}, lingerMost), open: make(map[*os.File]struct{})}
}

// answer answers the connection fd, which it owns, and returns at once.
func (a *answerer) answer(fd int) {
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
	if a.closed {
		a.mu.Unlock()
		f.Close()
		<-a.slots
		return
	}
	a.open[f] = struct{}{}
	a.wg.Add(1)
	a.mu.Unlock()
	go a.linger(f)
}

// linger waits for the client to hang up and closes f.
func (a *answerer) linger(f *os.File) {
	defer a.wg.Done()
	f.SetReadDeadline(time.Now().Add(lingerFor))
	io.Copy(io.Discard, io.LimitReader(f, lingerBytes))
	a.mu.Lock()
	delete(a.open, f)
	a.mu.Unlock()
	f.Close()
	<-a.slots
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
