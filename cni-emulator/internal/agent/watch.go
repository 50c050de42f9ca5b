package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

	"ambient-emulator/cni-emulator/internal/control"
	"ambient-emulator/cni-emulator/internal/redirect"
	"ambient-emulator/internal/netns"
)

const (
	// arrival is how long a file may take to become a namespace: ip-netns(8)
	// makes an empty file and mounts the namespace on it, and only the file has
	// an event.
	arrival = time.Second
	// How often to look meanwhile: soon at first, then more seldom.
	lookFirst, lookLast = time.Millisecond, 20 * time.Millisecond
)

// watcher makes a pod of every namespace in a directory: what the informer does
// for the real agent. Its goroutine owns all of it.
type watcher struct {
	a     *Agent
	dir   string
	match string // a glob, "" for all but a container runtime's

	inotify *fsnotify.Watcher
	events  <-chan fsnotify.Event
	errors  <-chan error
	armed   os.FileInfo // the directory that is watched, or nil
	above   string      // the one that is watched while dir is not there, or ""

	// By file name.
	pods     map[string]netns.ID // what has been a pod since its file came
	arriving map[string]waiting  // what is no namespace yet
	taken    map[string]bool     // what was another pod's

	look time.Duration // until the next look at what is arriving
}

// waiting is a file that is no namespace yet.
type waiting struct {
	until time.Time
	err   error // why not
}

// newWatcher starts to watch, and enrols what is there already.
func newWatcher(a *Agent, dir, match string) (*watcher, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	in, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w%s", dir, err, inotifyAdvice(err))
	}
	w := &watcher{
		a: a, dir: dir, match: match,
		inotify: in, events: in.Events, errors: in.Errors,
		pods: make(map[string]netns.ID), arriving: make(map[string]waiting), taken: make(map[string]bool),
	}
	if err := w.arm(); err != nil {
		return nil, errors.Join(err, in.Close())
	}
	return w, nil
}

// run follows the directory until ctx ends.
func (w *watcher) run(ctx context.Context) error {
	check := time.NewTicker(checkEvery)
	defer check.Stop()
	for {
		// No timer unless something is arriving.
		var look <-chan time.Time
		if len(w.arriving) > 0 {
			look = time.After(w.look)
		}
		var err error
		select {
		case ev := <-w.events:
			err = w.event(ev)
		case e := <-w.errors:
			// Events were lost (the kernel's queue is bounded), or something
			// else went wrong: only the directory itself can tell.
			w.a.log.Warn("events of the watched directory were lost; looking at all of it", "dir", w.dir, "error", e)
			err = w.arm()
		case <-check.C:
			err = w.check()
		case <-look:
			w.lookAgain()
		case <-ctx.Done():
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (w *watcher) close() error { return w.inotify.Close() }

// event is one change.
func (w *watcher) event(ev fsnotify.Event) error {
	if filepath.Dir(ev.Name) != w.dir || ev.Name == w.dir {
		// The directory itself, or one above it, came or went.
		if ev.Has(fsnotify.Create) || ev.Has(fsnotify.Remove) || ev.Has(fsnotify.Rename) {
			return w.arm()
		}
		return nil
	}
	name := filepath.Base(ev.Name)
	switch {
	case ev.Has(fsnotify.Remove), ev.Has(fsnotify.Rename):
		w.left(name)
	case ev.Has(fsnotify.Create):
		w.came(name)
	}
	return nil
}

// wanted tells whether a file's name is one of a pod.
func (w *watcher) wanted(name string) bool {
	if w.match == "" {
		return !runtimeName(name)
	}
	ok, _ := filepath.Match(w.match, name) // the pattern was checked
	return ok
}

// runtimeName tells names that a container runtime gives its namespaces, cni- and
// a UUID: those pods are the real agent's.
func runtimeName(name string) bool {
	uuid, ok := strings.CutPrefix(name, "cni-")
	if !ok || len(uuid) != 36 {
		return false
	}
	for i, c := range []byte(uuid) {
		dash := i == 8 || i == 13 || i == 18 || i == 23
		hex := '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
		if dash != (c == '-') || !dash && !hex {
			return false
		}
	}
	return true
}

// came enrols a file's namespace, or waits for it to be one.
func (w *watcher) came(name string) {
	if !w.wanted(name) {
		return
	}
	path := filepath.Join(w.dir, name)
	ns, err := netns.Open(path)
	if err != nil {
		w.await(name, err)
		return
	}
	if w.pods[name] == ns.ID() {
		delete(w.arriving, name)
		ns.Close()
		return
	}
	id := control.PodID{Name: name, Namespace: "default", ServiceAccount: "default", Path: path}
	id.UID = control.DefaultUID(id.Namespace, id.Name)
	nsID := ns.ID()
	_, err = w.a.Add(id, ns, true, nil) // takes ns
	if errors.Is(err, redirect.ErrLoDown) {
		w.await(name, err) // whoever makes a namespace sets lo up next
		return
	}
	delete(w.arriving, name)
	if err != nil {
		// The node's own namespace has a name in some directories (Docker's
		// "default"), and a pod may have a second name.
		w.a.log.Warn("no pod is made of a watched file", "path", path, "error", err)
		if errors.Is(err, ErrTaken) {
			w.taken[name] = true
		}
		return
	}
	w.pods[name] = nsID
	delete(w.taken, name)
}

// await looks at a file again that is no pod yet.
func (w *watcher) await(name string, why error) {
	wait, known := w.arriving[name]
	if !known {
		wait.until, w.look = time.Now().Add(arrival), lookFirst
	}
	wait.err = why
	w.arriving[name] = wait
}

// left ends the pod whose file is gone, unless a person has made it. Its name may
// be one that another --match wanted.
func (w *watcher) left(name string) {
	delete(w.pods, name)
	delete(w.arriving, name)
	delete(w.taken, name)
	w.a.deleteWatched(control.DefaultUID("default", name), filepath.Join(w.dir, name))
	for other := range w.taken { // perhaps by the one that is gone
		w.came(other)
	}
}

// lookAgain looks at the files that are no namespaces yet.
func (w *watcher) lookAgain() {
	now := time.Now()
	w.look = min(2*w.look, lookLast)
	for name := range w.arriving {
		w.came(name)
		if wait, still := w.arriving[name]; still && now.After(wait.until) {
			delete(w.arriving, name)
			w.a.log.Warn("no pod is made of a watched file", "path", filepath.Join(w.dir, name), "waited", arrival, "error", wait.err)
		}
	}
}
