package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// checkEvery is how often the watcher makes sure that it watches the directory
// that its path leads to.
const checkEvery = time.Second

// arm watches the directory, or as long as it is not there the nearest one above
// it that is, and enrols what is in it.
func (w *watcher) arm() error {
	for {
		// In this order: if another one takes its place in between, check sees it.
		armed, err := os.Stat(w.dir)
		if err == nil {
			err = w.inotify.Add(w.dir)
		}
		if err == nil {
			w.armed = armed
			if w.above != "" {
				w.inotify.Remove(w.above) // it may be gone itself
				w.above = ""
				w.a.log.Info("watching", "dir", w.dir)
			}
			return w.scan()
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("watch %s: %w%s", w.dir, err, inotifyAdvice(err))
		}
		w.armed = nil
		above := w.dir
		for above != "/" {
			above = filepath.Dir(above)
			if err = w.inotify.Add(above); err == nil || !errors.Is(err, fs.ErrNotExist) {
				break
			}
		}
		if err != nil {
			return fmt.Errorf("watch %s, while %s is not there: %w", above, w.dir, err)
		}
		if above == w.above {
			return w.scan() // watched since before we looked for the directory
		}
		if w.above != "" {
			w.inotify.Remove(w.above)
		}
		w.above = above
		w.a.log.Info("the directory to watch is not there yet", "dir", w.dir, "watching", above)
		// Once more: it may have come in between.
	}
}

// check arms anew if the path leads to another directory than the one that is
// watched. inotify(7) follows the inode, not the path: if something is mounted on
// the directory there is no event at all, and that it was unmounted fsnotify keeps
// to itself.
func (w *watcher) check() error {
	now, err := os.Stat(w.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist) && w.armed == nil:
		return nil
	case err == nil && w.armed != nil && os.SameFile(now, w.armed):
		return nil
	}
	if w.armed != nil {
		w.a.log.Warn("the watched directory was mounted on, unmounted or replaced; looking at what is there now", "dir", w.dir)
		w.inotify.Remove(w.dir) // the kernel may have done so
	}
	return w.arm()
}

// inotifyAdvice says what inotify(7) means.
func inotifyAdvice(err error) string {
	switch {
	case errors.Is(err, unix.EMFILE):
		return "; raise the sysctl fs.inotify.max_user_instances"
	case errors.Is(err, unix.ENOSPC):
		return "; raise the sysctl fs.inotify.max_user_watches"
	}
	return ""
}

// scan compares what there is with what is known.
func (w *watcher) scan() error {
	entries, err := os.ReadDir(w.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("watch %s: %w", w.dir, err)
	}
	there := make(map[string]bool, len(entries))
	for _, e := range entries {
		there[e.Name()] = true
	}
	// The pods, not only what we have seen ourselves: the agent before us had
	// others, whose files went without an event.
	for _, name := range w.a.watchedIn(w.dir) {
		if !there[name] {
			w.left(name)
		}
	}
	for name := range w.pods {
		if !there[name] {
			w.left(name) // another pod's now, or a person's
		}
	}
	for name := range there {
		w.came(name)
	}
	return nil
}
