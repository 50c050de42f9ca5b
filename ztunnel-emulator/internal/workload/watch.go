package workload

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// settleFor is how long a file must be left alone before it is read: who writes
	// into it truncates it first.
	settleFor = 50 * time.Millisecond
	// settleMost is how long that can be put off.
	settleMost = 10 * settleFor
	// checkEvery is how often we look without being told. inotify(7) says nothing
	// of other machines' writes, of mounts, and of what symbolic links lead to.
	checkEvery = time.Second
)

// watcher follows a file. After start, its fields belong to run.
type watcher struct {
	store *Store
	path  string
	log   *slog.Logger

	content []byte      // that was judged last, for better or worse
	info    fs.FileInfo // of the file when it was read last; nil: it could not be
	trouble string      // with reading it, as it was logged last

	inotify *fsnotify.Watcher // nil: there is none to be had
	stop    chan struct{}
	once    sync.Once
	done    chan struct{}
}

// first reads the file at the start, where an error is the end.
func (w *watcher) first() error {
	data, info, err := read(w.path)
	if err != nil {
		return err
	}
	w.content, w.info = data, info
	return w.accept(data)
}

// accept puts data in force, or says what is wrong with it.
func (w *watcher) accept(data []byte) error {
	state, err := Parse(data)
	if err != nil {
		return fmt.Errorf("%s: %w", w.path, err)
	}
	w.store.set(state)
	for _, warning := range state.Warnings() {
		w.log.Warn("the configuration is accepted, but: " + warning)
	}
	return nil
}

// start watches the directory: editors and Kubernetes put another file, or
// another link, in the place of the old one.
func (w *watcher) start() {
	w.stop, w.done = make(chan struct{}), make(chan struct{})
	inotify, err := fsnotify.NewWatcher()
	if err == nil {
		if err = inotify.Add(filepath.Dir(w.path)); err != nil {
			inotify.Close()
			inotify = nil
		}
	}
	if err != nil {
		w.log.Warn("there is no inotify; looking at the file once a second", "error", err)
	}
	w.inotify = inotify
	go w.run()
}

func (w *watcher) close() {
	w.once.Do(func() { close(w.stop) })
	<-w.done
}

// run is the watcher's goroutine.
func (w *watcher) run() {
	defer close(w.done)
	var events chan fsnotify.Event
	var failures chan error
	if w.inotify != nil {
		defer w.inotify.Close()
		events, failures = w.inotify.Events, w.inotify.Errors
	}
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	var settled <-chan time.Time // nil: nothing has happened
	var since time.Time
	touched := func() {
		now := time.Now()
		if settled == nil {
			since = now
		}
		settled = time.After(min(settleFor, since.Add(settleMost).Sub(now)))
	}
	for {
		select {
		case <-w.stop:
			return
		case e := <-events:
			// Another name's event may be a link's that ours leads through.
			if e.Name == w.path || w.differs() {
				touched()
			}
		case err := <-failures:
			w.log.Warn("watching the file", "error", err)
			touched()
		case <-tick.C:
			if settled == nil && w.differs() {
				touched()
			}
		case <-settled:
			settled = nil
			w.look()
		}
	}
}

// differs tells whether the path leads to something else than what was read.
func (w *watcher) differs() bool {
	now, err := os.Stat(w.path)
	if err != nil || w.info == nil {
		return (err == nil) != (w.info == nil)
	}
	return !os.SameFile(now, w.info) || now.Size() != w.info.Size() || !now.ModTime().Equal(w.info.ModTime())
}

// look reads the file, and puts it in force if it is new and good.
func (w *watcher) look() {
	data, info, err := read(w.path)
	w.info = info
	if err != nil {
		w.unreadable(err)
		return
	}
	if w.trouble != "" {
		w.trouble = ""
		w.log.Info("the configuration can be read again")
	}
	if bytes.Equal(data, w.content) {
		return
	}
	w.content = data
	if err := w.accept(data); err != nil {
		w.log.Error("the new configuration is refused; the old one stays in force", "error", err)
		return
	}
	w.log.Info("the new configuration is in force")
}

// unreadable says once what is the matter.
func (w *watcher) unreadable(err error) {
	text := err.Error()
	switch {
	case text == w.trouble:
	case errors.Is(err, fs.ErrNotExist):
		w.log.Warn("the configuration is gone; what it said stays in force")
	default:
		w.log.Error("the configuration cannot be read; what it said stays in force", "error", err)
	}
	w.trouble = text
}
