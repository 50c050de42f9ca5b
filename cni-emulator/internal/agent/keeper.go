package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/cni-emulator/internal/control"
)

// How long after a failed write of the state file the next one is tried: soon at
// first, then more seldom.
const retryFirst, retryLast = 100 * time.Millisecond, 30 * time.Second

// keeper writes the pods to the state file, one write at a time. What changes
// during a write goes into the next one: a thousand pods that come at once cost
// a few writes, not a thousand.
type keeper struct {
	path  string                     // "": nothing is kept
	write func(string, memory) error // writeState
	dirty chan struct{}              // has room for one: there is something to write

	mu      sync.Mutex
	written uint64        // the generation that the last write had
	err     error         // of the last write
	again   chan struct{} // closed after the next write
}

func newKeeper(path string) *keeper {
	return &keeper{path: path, write: writeState, dirty: make(chan struct{}, 1), again: make(chan struct{})}
}

// changed notes that the pods are not what they were. The caller holds the lock.
func (a *Agent) changed() {
	a.generation++
	select {
	case a.keeper.dirty <- struct{}{}:
	default: // noted already
	}
}

// keep writes until stop is closed, and then a last time if need be. What could
// not be written is tried again by itself: the next change may be days away.
func (a *Agent) keep(stop <-chan struct{}) {
	var again <-chan time.Time // of what could not be written
	pause := retryFirst
	for {
		select {
		case <-a.keeper.dirty:
		case <-again:
		case <-stop:
			select {
			case <-a.keeper.dirty:
				a.saveOrLog()
			default:
				if again != nil {
					a.saveOrLog()
				}
			}
			return
		}
		ok := a.saveOrLog()
		switch {
		case !ok:
			again = time.After(pause)
			pause = min(2*pause, retryLast)
		case again != nil:
			a.log.Info("the state file is written again", "state", a.keeper.path)
			again, pause = nil, retryFirst
		}
	}
}

func (a *Agent) saveOrLog() bool {
	err := a.save()
	if err != nil {
		a.log.Error("after a restart the pods would not be known", "error", err)
	}
	return err == nil
}

// save writes the pods as they are now, and tells who waits for that.
func (a *Agent) save() error {
	k := a.keeper
	if k.path == "" {
		return nil
	}
	m, generation := a.remember()
	err := k.write(k.path, m)
	if err != nil {
		err = fmt.Errorf("write the state file: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.written, k.err = generation, err
	close(k.again)
	k.again = make(chan struct{})
	return err
}

// onDisk waits until all that is true now is in the state file: a verb's success
// is for good. ztunnel is told meanwhile; a crash in between leaves a pod that
// its verb did not call done.
func (a *Agent) onDisk(ctx context.Context) error {
	k := a.keeper
	if k.path == "" {
		return nil
	}
	a.mu.Lock()
	now := a.generation
	a.mu.Unlock()
	for {
		k.mu.Lock()
		written, err, again := k.written, k.err, k.again
		k.mu.Unlock()
		switch {
		case written >= now && err != nil:
			return fmt.Errorf("it is done, but the agent's next start will not know of it: %w", err)
		case written >= now:
			return nil
		}
		select {
		case <-again:
		case <-ctx.Done():
			return ErrStopping
		}
	}
}

// remember collects what the state file is to hold.
func (a *Agent) remember() (memory, uint64) {
	m := memory{BootID: bootID()}
	a.mu.Lock()
	handles := make([]*handle, 0, len(a.pods))
	for _, p := range a.pods {
		r := record{PodID: p.PodID, Watched: p.watched, Inode: p.was.Inode, Cookie: p.was.Cookie}
		var h *handle
		if p.netns != nil {
			h = p.netns.hold()
			r.Inode, r.Cookie = h.ns.ID().Ino, 0
		}
		m.Pods, handles = append(m.Pods, r), append(handles, h)
	}
	for _, some := range []map[*handle]control.PodID{a.arriving, a.leaving} {
		for h, id := range some {
			m.Leaving, handles = append(m.Leaving, record{PodID: id, Inode: h.ns.ID().Ino}), append(handles, h.hold())
		}
	}
	generation := a.generation
	a.mu.Unlock()

	// Without the lock: each cookie is a trip into a pod, made once.
	for i, h := range handles {
		if h == nil {
			continue
		}
		if i < len(m.Pods) {
			m.Pods[i].Cookie = a.cookie(h)
		} else {
			m.Leaving[i-len(m.Pods)].Cookie = a.cookie(h)
		}
		h.release()
	}
	return m, generation
}

// cookie returns the cookie of a namespace, or 0 if it can't be known. Only one
// goroutine at a time asks.
func (a *Agent) cookie(h *handle) uint64 {
	if h.cookie == 0 && !a.blind {
		cookie, err := cookieOf(h.ns)
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOPROTOOPT) {
			a.blind = true // it will be no better for the next one
		}
		if err != nil {
			a.log.Warn("a namespace's cookie can't be read, so that after a restart nobody can tell whether its path still leads to it; that needs CAP_SYS_ADMIN and Linux 5.14", "netns", h.ns.ID(), "error", err)
		}
		h.cookie = cookie
	}
	return h.cookie
}
