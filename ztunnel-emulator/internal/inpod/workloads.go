package inpod

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/zds"
	"ambient-emulator/ztunnel-emulator/internal/proxy"
)

// StartError says that a pod's listeners could not be made. It is transient: the
// pod is pending, and the start is tried again.
type StartError struct{ Err error }

func (e *StartError) Error() string { return e.Err.Error() }
func (e *StartError) Unwrap() error { return e.Err }

// ProtocolError says that the agent does not follow the protocol that we know.
// The real ztunnel ends itself then, and so do we.
type ProtocolError struct{ Text string }

func (e *ProtocolError) Error() string { return fmt.Sprintf("ProtocolError(%q)", e.Text) }

// The protocol errors, in the real ztunnel's words.
var (
	errNoInfo         = &ProtocolError{"workload_info is required but not present"}
	errLateKeep       = &ProtocolError{"pod keep received after snapshot"}
	errSecondSnapshot = &ProtocolError{"pod snapshot received already"}
)

// Workloads is the set of pods in ZDS mode: ztunnel's state machine. It belongs
// to one goroutine, but for Counts. Events are the agent's messages, a new
// connection, and the retry timer.
type Workloads struct {
	engine *engine
	log    *slog.Logger

	running map[string]*pod    // uid -> a pod with listeners; survives connections
	pending map[string]pending // uid -> a start that has failed; only this connection's

	// What the agent has named since this connection began, until it says that
	// this is all.
	snapshot         map[string]struct{}
	snapshotReceived bool

	mu     sync.Mutex
	counts Counts
}

// pending is a pod that could not be started. ns may be nil: what came was no
// namespace, and no retry can help.
type pending struct {
	id  proxy.Identity
	ns  *netns.NS
	err error
}

// Counts are the real ztunnel's metrics of its workload manager.
type Counts struct {
	Active, Pending  int
	Started, Stopped int
}

// NewWorkloads returns an empty set whose pods get listeners by c, and whose
// connections are served by config.
func NewWorkloads(c SocketConfig, config *proxy.Config, log *slog.Logger) (*Workloads, error) {
	e, err := newEngine(c.Addrs(), c.factory(log), config, log)
	if err != nil {
		return nil, err
	}
	if c.DNS {
		e.openDNS = c.openDNS
	}
	w := &Workloads{engine: e, log: log, running: make(map[string]*pod)}
	w.NewConnection()
	return w, nil
}

// NewConnection forgets what belonged to the last connection: pending starts and
// its snapshot. Running pods keep their listeners.
func (w *Workloads) NewConnection() {
	for uid := range w.pending {
		w.dropPending(uid)
	}
	w.pending = make(map[string]pending)
	w.snapshot = make(map[string]struct{})
	w.snapshotReceived = false
	w.count()
}

// Ready tells whether every pod that the agent knows is served.
func (w *Workloads) Ready() bool { return w.snapshotReceived && len(w.pending) == 0 }

// HavePending tells whether there is something to retry.
func (w *Workloads) HavePending() bool { return len(w.pending) > 0 }

// Counts may be called by anybody.
func (w *Workloads) Counts() Counts {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.counts
}

// Handle takes one request; fd is an add's descriptor, which it takes over. nil
// is an ack; a *StartError or a *ProtocolError a nack.
func (w *Workloads) Handle(req *zds.WorkloadRequest, fd int) error {
	defer w.count()
	switch p := req.Payload.(type) {
	case *zds.WorkloadRequest_Add:
		ns, err := netns.FromFD(fd) // closes what it refuses, at once
		if p.Add.WorkloadInfo == nil {
			if err == nil {
				w.engine.letGo(ns)
			}
			return errNoInfo
		}
		return w.add(p.Add, ns, err)
	case *zds.WorkloadRequest_Keep:
		if w.snapshotReceived {
			return errLateKeep
		}
		w.snapshot[p.Keep.Uid] = struct{}{} // known or not
		return nil
	case *zds.WorkloadRequest_Del:
		w.del(p.Del.Uid)
		return nil
	case *zds.WorkloadRequest_SnapshotSent:
		if w.snapshotReceived {
			return errSecondSnapshot
		}
		w.reconcile()
		return nil
	}
	return &ProtocolError{"unknown payload"} // not reached: zds refuses it
}

// add starts a pod, unless it runs there already. ns is nil when what came is no
// namespace, and nsErr says so.
func (w *Workloads) add(req *zds.AddWorkload, ns *netns.NS, nsErr error) error {
	uid := req.Uid
	if !w.snapshotReceived {
		// Even if the start fails: the agent has named it.
		w.snapshot[uid] = struct{}{}
	}
	if old, ok := w.running[uid]; ok {
		if ns != nil && old.ns.ID() == ns.ID() && !old.broken.Load() {
			w.dropPending(uid)
			w.engine.letGo(ns)
			return nil
		}
		// The pod's sandbox was made anew, or a listener has died. What is no
		// namespace at all is another one, too, as far as the real ztunnel can tell.
		w.stop(uid, old, "replaced")
	}
	w.dropPending(uid)

	info := req.WorkloadInfo
	id := proxy.Identity{Name: info.Name, Namespace: info.Namespace, ServiceAccount: info.ServiceAccount}
	err := nsErr
	if err == nil {
		err = w.start(uid, id, ns)
	}
	if err != nil {
		w.pending[uid] = pending{id: id, ns: ns, err: err}
		w.log.Warn("pod pending", "uid", uid, "pod", id.String(), "netns", idOf(ns), "error", err)
		return &StartError{err}
	}
	return nil
}

// start starts a pod. After an error ns is still the caller's.
func (w *Workloads) start(uid string, id proxy.Identity, ns *netns.NS) error {
	began := time.Now()
	pod, added, err := w.engine.start(ns, id)
	if err != nil {
		return err
	}
	w.running[uid] = pod
	w.mu.Lock()
	w.counts.Started++
	w.mu.Unlock()
	w.log.Info("pod served", "uid", uid, "pod", id.String(), "netns", ns.ID(), "duration", time.Since(began))
	if added.LoopDown {
		// Without looking for the pod's name, which takes too long before an ack.
		w.log.Warn(loopDown(ns.FD()), "uid", uid, "pod", id.String(), "netns", ns.ID())
	}
	if added.NoLoop6 {
		w.log.Warn("the pod has no ::1: its DNS over IPv6 is served when it has", "uid", uid, "pod", id.String(), "netns", ns.ID())
	}
	return nil
}

// del ends a pod. Before the snapshot is complete a running pod is left to the
// reconciliation, which will not find it named.
func (w *Workloads) del(uid string) {
	w.dropPending(uid)
	if !w.snapshotReceived {
		delete(w.snapshot, uid)
		return
	}
	if pod, ok := w.running[uid]; ok {
		w.stop(uid, pod, "deleted")
	}
}

// reconcile ends every running pod that the snapshot has not named.
func (w *Workloads) reconcile() {
	w.snapshotReceived = true
	for uid, pod := range w.running {
		if _, named := w.snapshot[uid]; !named {
			w.stop(uid, pod, "not in the snapshot")
		}
	}
	w.snapshot = nil
}

// Retry tries every pending start once more.
func (w *Workloads) Retry() {
	defer w.count()
	for uid, p := range w.pending {
		if p.ns == nil {
			continue
		}
		if err := w.start(uid, p.id, p.ns); err != nil {
			p.err = err
			w.pending[uid] = p
			w.log.Warn("pod still pending", "uid", uid, "pod", p.id.String(), "netns", p.ns.ID(), "error", err)
			continue
		}
		delete(w.pending, uid) // its namespace is the running pod's now
	}
}

// stop ends a running pod at once.
func (w *Workloads) stop(uid string, pod *pod, why string) {
	id := pod.ns.ID()
	delete(w.running, uid)
	if err := w.engine.stop(pod); err != nil {
		w.log.Error("pod stop", "uid", uid, "netns", id, "error", err)
	}
	w.mu.Lock()
	w.counts.Stopped++
	w.mu.Unlock()
	w.log.Info("pod stopped", "uid", uid, "netns", id, "why", why)
}

func (w *Workloads) dropPending(uid string) {
	if p, ok := w.pending[uid]; ok {
		delete(w.pending, uid)
		if p.ns != nil {
			w.engine.letGo(p.ns)
		}
	}
}

// Close ends every pod. With a deadline the end is graceful: see leave.
func (w *Workloads) Close(deadline time.Duration) error {
	w.NewConnection()
	var pods []*pod
	for _, pod := range w.running {
		pods = append(pods, pod)
	}
	if deadline > 0 {
		w.engine.drain(pods, deadline)
	}
	// All at once: the deadline is over, and each may take a moment.
	errs := make([]error, len(pods))
	var stopping sync.WaitGroup
	for i, pod := range pods {
		stopping.Go(func() { errs[i] = w.engine.stop(pod) })
	}
	stopping.Wait()
	w.running = nil
	return errors.Join(append(errs, w.engine.close())...)
}

// Active is how many pods are served.
func (w *Workloads) Active() int { return w.Counts().Active }

// count publishes the gauges.
func (w *Workloads) count() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.counts.Active, w.counts.Pending = len(w.running), len(w.pending)
}

func idOf(ns *netns.NS) string {
	if ns == nil {
		return "none"
	}
	return ns.ID().String()
}
