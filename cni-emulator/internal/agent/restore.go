package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// restore brings back the pods that an agent before this one wrote down. Nobody
// else is at work yet.
func (a *Agent) restore() error {
	if a.keeper.path == "" {
		return nil
	}
	m, aside, err := readState(a.keeper.path)
	if err != nil {
		return fmt.Errorf("read the state file: %w", err)
	}
	if aside != nil {
		a.log.Error("the state file was not trusted", "error", aside)
	}
	boot := bootID()
	for _, r := range m.Pods {
		if boot == "" || m.BootID != boot {
			r.Cookie = 0 // of another boot, which knew other namespaces
		}
		if err := a.restorePod(r); err != nil {
			a.log.Warn("pod dropped", "pod", r.Namespace+"/"+r.Name, "uid", r.UID, "path", r.Path, "error", err)
		}
	}
	for _, r := range m.Leaving {
		if boot == "" || m.BootID != boot {
			continue // no rule outlives its boot
		}
		// Its delete was cut short. No ztunnel is asked: it hears in its snapshot that
		// the pod is no more.
		if err := a.releaseAgain(r); err != nil {
			a.log.Warn("pod deleted before the restart, but not released", "pod", r.Namespace+"/"+r.Name, "uid", r.UID, "path", r.Path, "error", err)
		}
	}
	if len(m.Pods) > 0 || aside != nil {
		a.log.Info("pods restored", "state", a.keeper.path, "pods", len(a.pods), "of", len(m.Pods))
	}
	return nil
}

// restorePod opens a pod's namespace again. An error means that the pod is no
// more.
func (a *Agent) restorePod(r record) error {
	p := &pod{PodID: r.PodID, watched: r.Watched, was: r}
	args := []any{"pod", p, "uid", p.UID, "path", p.Path}
	ns, err := netns.Open(p.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR), p.Path == "":
		return errors.New("its namespace has no file any more")
	case err != nil:
		// The pod may well live: ztunnel is to keep what it has.
		a.log.Warn("pod kept, though its namespace is not at hand", append(args, "error", err)...)
		p.fail(err.Error())
		a.pods[p.UID] = p
		return nil
	}

	h := newHandle(ns, a.log)
	if err := a.checkNetNS(ns.ID()); err != nil {
		h.release()
		return err
	}
	if other := a.byNetNS[ns.ID()]; other != nil {
		h.release()
		return fmt.Errorf("%w: %v is %s (uid %s)", ErrTaken, ns.ID(), other, other.UID)
	}

	// Is it the one that it was? Only the cookie tells.
	var same string
	now := a.cookie(h)
	switch {
	case r.Cookie == 0 || now == 0:
		same = "unknown"
	case r.Cookie == now:
		same = "same"
	default:
		same = "another"
	}
	if same != "same" && strings.HasPrefix(p.Path, "/proc/") {
		// The path of a process is no pod's for good: its pid comes back.
		h.release()
		if same == "another" {
			return errors.New("its path leads to the namespace of another process now")
		}
		p.fail("nobody can tell whether the path still leads to the pod's namespace; add it again")
		a.log.Warn("pod kept, though its namespace is not at hand", append(args, "error", p.lastError)...)
		a.pods[p.UID] = p
		return nil
	}
	// Its rules are in place, or they come now: nobody hears of it without them.
	if _, err := a.capture(&p.PodID, ns, false); err != nil {
		h.release()
		p.fail(err.Error())
		a.pods[p.UID] = p
		a.log.Warn("pod kept, but it can't be captured; add it again", append(args, "error", err)...)
		return nil
	}
	// Another one, under the pod's own path: a new pod in the place of the old.
	// Unknown: it goes out as an add all the same. ztunnel still holds the
	// namespace that it had, and knows by device and inode whether this is it.
	p.netns = h
	a.pods[p.UID] = p
	a.byNetNS[ns.ID()] = p
	a.log.Info("pod restored", append(args, "netns", ns.ID(), "namespace", same)...)
	return nil
}
