package workload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// Store holds the State that is in force. With a file it follows the file, which
// the real one does not: who edits it by hand wants to see what happens. A file
// that cannot be used changes nothing.
type Store struct {
	node string
	log  *slog.Logger

	mu      sync.Mutex
	state   *State
	changed chan struct{} // closed when state is no longer the newest

	watcher *watcher // nil without a file
}

// LocalWait is how long a pod's own workload is waited for.
const LocalWait = 5 * time.Second

// Open reads the file (LOCAL_XDS_PATH) and follows it until Close. node is the
// node that we are on (NODE_NAME), or "".
func Open(path, node string, log *slog.Logger) (*Store, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	s := newStore(node, log)
	w := &watcher{store: s, path: path, log: log.With("path", path)}
	if err := w.first(); err != nil {
		return nil, err
	}
	s.watcher = w
	w.start()
	return s, nil
}

// FromInline reads the text itself (LOCAL_XDS). It never changes.
func FromInline(text, node string, log *slog.Logger) (*Store, error) {
	state, err := Parse([]byte(text))
	if err != nil {
		return nil, fmt.Errorf("inline configuration: %w", err)
	}
	s := newStore(node, log)
	s.set(state)
	for _, warning := range state.Warnings() {
		log.Warn("the inline configuration is accepted, but: " + warning)
	}
	return s, nil
}

func newStore(node string, log *slog.Logger) *Store {
	return &Store{node: node, log: log, state: Empty(), changed: make(chan struct{})}
}

// Close ends the watching and waits until it has ended. The last state stays.
func (s *Store) Close() {
	if s.watcher != nil {
		s.watcher.close()
	}
}

// State returns what is in force.
func (s *Store) State() *State {
	state, _ := s.Watch()
	return state
}

// Watch returns what is in force, and a channel that is closed when it no longer
// is. Ask again then.
func (s *Store) Watch() (*State, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state, s.changed
}

func (s *Store) set(state *State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.changed)
	s.state, s.changed = state, make(chan struct{})
}

// UnknownLocalError says that a pod of this node has no workload in the file.
type UnknownLocalError struct{ Name, Namespace, ServiceAccount string }

// The words are ztunnel's, for the access log.
func (e *UnknownLocalError) Error() string {
	return fmt.Sprintf("failed to fetch information about local workload: %s.%s (%s)", e.ServiceAccount, e.Namespace, e.Name)
}

// Local returns the workload that a pod of this node is. If there is none yet it
// waits for up to LocalWait; then the error is an *UnknownLocalError, and ctx's
// when ctx is done before.
func (s *Store) Local(ctx context.Context, name, namespace, serviceAccount string) (*Workload, error) {
	var deadline <-chan time.Time
	for {
		state, changed := s.Watch()
		if w := state.LocalWorkload(name, namespace, serviceAccount, s.node); w != nil {
			return w, nil
		}
		if deadline == nil { // most never need the timer
			t := time.NewTimer(LocalWait)
			defer t.Stop()
			deadline = t.C
		}
		select {
		case <-changed:
		case <-deadline:
			return nil, &UnknownLocalError{name, namespace, serviceAccount}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// read returns the content of a regular file, and what stat(2) says of it.
// Anything else might block (a FIFO) or never end (a device).
func read(path string) ([]byte, fs.FileInfo, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, nil, &fs.PathError{Op: "read", Path: path, Err: errors.New("this is no regular file; put the configuration into one")}
	}
	// One byte more than is allowed, so that Parse sees that it is too much.
	data, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	return data, info, err
}
