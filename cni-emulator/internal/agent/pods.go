package agent

import (
	"cmp"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"ambient-emulator/cni-emulator/internal/control"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/zds"
)

// What is wrong with a pod.
var (
	ErrNotAPod  = errors.New("a pod has a network namespace of its own")
	ErrTaken    = errors.New("the namespace belongs to another pod")
	ErrNoPod    = errors.New("no such pod")
	ErrReplaced = errors.New("the pod was given another namespace meanwhile")
	ErrDeleted  = errors.New("the pod was deleted meanwhile")
	ErrStopping = errors.New("the agent is stopping")
)

// pod is a pod as the agent knows it. Agent.mu guards all of it.
type pod struct {
	control.PodID
	watched     bool
	netns       *handle // its own reference; nil when the namespace is not at hand, and then it goes out as a keep
	was         record  // what the state file said of it, for as long as netns is nil
	lastError   string
	lastErrorAt time.Time
	waiters     []chan Outcome
}

// Outcome is how a pod's add ended at a ztunnel.
type Outcome struct {
	PID  int32  // the ztunnel's
	Nack string // its words, or "" for an ack
	Err  error  // nobody will answer any more
}

// Added is what a person should know of an add that went well.
type Added struct {
	Connected bool // there is a ztunnel to answer
	Reset     int  // open connections of the pod that do not survive its capture
}

func (p *pod) String() string { return p.Namespace + "/" + p.Name }

func (p *pod) fail(text string) { p.lastError, p.lastErrorAt = text, time.Now() }

// tell ends the wait of everybody who waits for the pod's answer. Each channel
// has room for it.
func (p *pod) tell(o Outcome) {
	for _, w := range p.waiters {
		w <- o
	}
	p.waiters = nil
}

// checkWords judges what a person said about a pod.
func checkWords(id control.PodID) error {
	for _, w := range [][2]string{{"name", id.Name}, {"namespace", id.Namespace}, {"service account", id.ServiceAccount}, {"uid", id.UID}} {
		what, word := w[0], w[1]
		if word == "" {
			return fmt.Errorf("the pod's %s is empty", what)
		}
		if !utf8.ValidString(word) || strings.ContainsFunc(word, func(r rune) bool { return !unicode.IsPrint(r) }) {
			return fmt.Errorf("the pod's %s %q has characters that can't be printed", what, word)
		}
	}
	if n := proto.Size(addRequest(id)); n > zds.MaxPacket {
		return fmt.Errorf("%w: it would have %d; choose shorter names", zds.ErrTooLong, n)
	}
	return nil
}

func addRequest(id control.PodID) *zds.WorkloadRequest {
	return zds.Add(id.UID, id.Name, id.Namespace, id.ServiceAccount)
}

// checkNetNS refuses namespaces that are no pod's. A ztunnel that listened in
// one of them would catch the node's own traffic.
func (a *Agent) checkNetNS(id netns.ID) error {
	switch id {
	case a.home:
		return fmt.Errorf("%v is the agent's own network namespace: %w", id, ErrNotAPod)
	case a.host:
		return fmt.Errorf("%v is the host's network namespace: %w", id, ErrNotAPod)
	}
	return nil
}

// Add makes a pod known, or known anew, and sends it to the newest ztunnel. It
// takes ns over. The same uid with the same namespace and names is a success that
// changes nothing but whose the pod is: one that is not watched, because a person
// added it, stays when its file goes. With another namespace it replaces the pod;
// with other names ztunnels let it go and the newest takes it anew.
//
// The outcome goes to waiter, which has room for one, once a ztunnel has
// answered; waiter may be nil. Add itself waits for nobody.
//
// As in the real agent the add goes out even if nothing has changed: ztunnel
// takes it as a no-op, and a pod that it could not serve is tried again.
func (a *Agent) Add(id control.PodID, ns *netns.NS, watched bool, waiter chan Outcome) (added Added, err error) {
	return a.add(id, newHandle(ns, a.log), watched, waiter)
}

// add is Add of an open namespace. It takes h over.
func (a *Agent) add(id control.PodID, h *handle, watched bool, waiter chan Outcome) (added Added, err error) {
	ns := h.ns
	if err := cmp.Or(checkWords(id), a.checkNetNS(ns.ID())); err != nil {
		h.release()
		return Added{}, err
	}
	// Until the pod stands in the table, or does not.
	defer a.rules.lock(ns.ID())()
	if added.Reset, err = a.capture(&id, ns, watched); err != nil {
		h.release()
		return Added{}, err
	}

	a.mu.Lock()
	defer a.mu.Unlock()
	// One namespace, one pod. The real agent does not look; there the second
	// pod's listeners share the first one's ports, and traffic gets either
	// identity. A handle in the table pins its namespace, so IDs can be compared.
	if other := a.byNetNS[ns.ID()]; other != nil && other.UID != id.UID {
		h.release()
		return Added{}, fmt.Errorf("%w: %v is %s (uid %s); `del` that first", ErrTaken, ns.ID(), other, other.UID)
	}
	p := a.pods[id.UID]
	// What a person has said of a pod stands, whatever --watch finds in its
	// place; and a pod that a person adds is his from then on.
	told := p != nil && watched && !p.watched
	switch {
	case p == nil:
		p = &pod{PodID: id, watched: watched, netns: h}
		a.pods[id.UID] = p
		a.log.Info("pod added", "pod", p, "uid", id.UID, "netns", ns.ID())
	case p.netns != nil && p.netns.ns.ID() == ns.ID():
		if !told {
			if !sameNames(p.PodID, id) {
				a.letGoOf(p)
			}
			p.PodID, p.watched = id, watched
		}
		h.release()
	case p.netns == nil && told && p.Path == id.Path:
		a.unbind(p, ErrReplaced)
		p.netns = h
		a.log.Info("pod's namespace is at hand again", "pod", p, "uid", id.UID, "netns", ns.ID())
	default:
		if p.captured() && p.netns != nil {
			left := p.netns.hold()
			a.leaving[left] = p.PodID
			a.parting.Go(func() { a.abandon(left) })
		}
		a.unbind(p, ErrReplaced)
		p.PodID, p.watched, p.netns = id, watched, h
		a.log.Info("pod replaced", "pod", p, "uid", id.UID, "netns", ns.ID())
	}
	a.byNetNS[ns.ID()] = p
	a.changed()

	if waiter != nil {
		p.waiters = append(p.waiters, waiter)
	}
	z := a.newest()
	if z == nil {
		return added, nil
	}
	added.Connected = true
	a.push(z, a.addOp(p))
	return added, nil
}

// sameNames tells whether a ztunnel would know the pod by the same names.
func sameNames(one, other control.PodID) bool {
	return one.Name == other.Name && one.Namespace == other.Namespace && one.ServiceAccount == other.ServiceAccount
}

// letGoOf has every ztunnel end the pod, because it would take the next add for the
// same again. Nobody waits for their answers. The caller holds the lock.
func (a *Agent) letGoOf(p *pod) {
	a.log.Info("pod has other names: ztunnels let it go, and take it anew", "pod", p, "uid", p.UID)
	unheard := make(chan Outcome, len(a.ztunnels))
	for _, z := range a.ztunnels {
		delete(z.answers, p.UID)
		a.push(z, &op{what: "del", uid: p.UID, req: zds.Del(p.UID), done: unheard})
	}
}

// unwait takes a waiter back that has lost its patience.
func (a *Agent) unwait(uid string, waiter chan Outcome) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.pods[uid]; p != nil {
		p.waiters = slices.DeleteFunc(p.waiters, func(w chan Outcome) bool { return w == waiter })
	}
}

// unbind parts a pod from its namespace, and from what was said about it. The
// caller holds the lock.
func (a *Agent) unbind(p *pod, why error) {
	if p.netns != nil {
		delete(a.byNetNS, p.netns.ns.ID())
		p.netns.release()
		p.netns = nil
	}
	p.lastError, p.lastErrorAt = "", time.Time{}
	for _, z := range a.ztunnels {
		delete(z.answers, p.UID)
	}
	p.tell(Outcome{Err: why})
}

// Find returns the uid of the pod that a person means.
func (a *Agent) Find(id control.PodID) (uid string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if id.UID != "" {
		if a.pods[id.UID] == nil {
			return "", fmt.Errorf("%w: uid %s; `cni-emulator list` shows what there is", ErrNoPod, id.UID)
		}
		return id.UID, nil
	}
	var found []string
	for uid, p := range a.pods {
		if p.Name == id.Name && p.Namespace == id.Namespace {
			found = append(found, uid)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return "", fmt.Errorf("%w: %s/%s; `cni-emulator list` shows what there is", ErrNoPod, id.Namespace, id.Name)
	}
	slices.Sort(found)
	return "", fmt.Errorf("%d pods are called %s/%s; name one with --uid: %s", len(found), id.Namespace, id.Name, strings.Join(found, ", "))
}

// Delete forgets a pod and tells every ztunnel. Each of the n gives one outcome:
// its answer, or the error with which its connection ended. One that has left
// (zds.Gone) comes back to a snapshot without the pod, or is no more. One that was
// dropped may hang, and serve the pod meanwhile. After that the pod's rules are
// taken out, and rules tells whether they could be; it is nil if there are none.
func (a *Agent) Delete(uid string) (n int, outcomes <-chan Outcome, rules <-chan error, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.pods[uid]
	if p == nil {
		return 0, nil, nil, fmt.Errorf("%w: uid %s", ErrNoPod, uid)
	}
	n, outcomes, rules = a.remove(p)
	return n, outcomes, rules, nil
}

// deleteWatched is Delete of a pod whose file is gone, if the file had made it.
func (a *Agent) deleteWatched(uid, path string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.pods[uid]; p != nil && p.watched && p.Path == path {
		a.remove(p)
	}
}

// watchedIn returns the names of the files in dir that have become pods.
func (a *Agent) watchedIn(dir string) (names []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, p := range a.pods {
		if p.watched && filepath.Dir(p.Path) == dir {
			names = append(names, filepath.Base(p.Path))
		}
	}
	return names
}

// remove is Delete with the lock held.
func (a *Agent) remove(p *pod) (n int, outcomes <-chan Outcome, rules <-chan error) {
	var left *handle
	captured, was := p.captured(), p.was
	was.PodID = p.PodID
	if captured && p.netns != nil {
		left = p.netns.hold()
		a.leaving[left] = p.PodID
	}
	a.unbind(p, ErrDeleted)
	delete(a.pods, p.UID)
	a.changed()
	a.log.Info("pod deleted", "pod", p, "uid", p.UID)

	answers := make(chan Outcome, len(a.ztunnels))
	for _, z := range a.ztunnels {
		a.push(z, &op{what: "del", uid: p.UID, req: zds.Del(p.UID), done: answers})
	}
	if !captured {
		return cap(answers), answers, nil
	}
	handedOn, released := make(chan Outcome, cap(answers)), make(chan error, 1)
	a.parting.Go(func() { a.uncapture(left, was, cap(answers), answers, handedOn, released) })
	return cap(answers), handedOn, released
}

// List returns all pods, by namespace, name and uid.
func (a *Agent) List() []control.Pod {
	a.mu.Lock()
	defer a.mu.Unlock()
	list := make([]control.Pod, 0, len(a.pods))
	for _, p := range a.pods {
		row := control.Pod{PodID: p.PodID, Watched: p.watched, LastError: p.lastError, Ztunnels: []control.Answer{}}
		if p.netns != nil {
			row.NetNS, row.Inode = p.netns.ns.ID().String(), p.netns.ns.ID().Ino
		}
		if p.lastError != "" {
			at := p.lastErrorAt
			row.LastErrorAt = &at
		}
		for _, z := range a.ztunnels {
			if said, ok := z.answers[p.UID]; ok {
				row.Ztunnels = append(row.Ztunnels, control.Answer{Ztunnel: z.number, PID: z.peer.PID, To: said.to, At: said.at, Nack: said.nack})
			}
		}
		list = append(list, row)
	}
	slices.SortFunc(list, func(x, y control.Pod) int {
		return cmp.Or(strings.Compare(x.Namespace, y.Namespace), strings.Compare(x.Name, y.Name), strings.Compare(x.UID, y.UID))
	})
	return list
}
