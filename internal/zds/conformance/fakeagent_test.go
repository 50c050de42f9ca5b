package conformance

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/zds"
)

// fakeAgent is the least that keeps all promises of an agent, and breaks one of
// them when it has a fault.
type fakeAgent struct {
	fault string

	mu     sync.Mutex
	pods   []*toldPod
	links  []*link
	leaked []int
	sent   map[string]bool // fault snapshot-once
}

type toldPod struct {
	uid, name, namespace, account string
	fd                            int
}

// link is one connection of a ztunnel, served by one goroutine.
type link struct {
	a       *fakeAgent
	conn    *net.UnixConn
	updates chan update
	gone    chan struct{}
	busy    bool // fault add-lost: in its snapshot
}

type update struct {
	p      *toldPod
	del    bool
	answer chan string
}

// runFakeAgent serves ztunnels at path and verbs at control until it is killed.
func runFakeAgent(path, control, fault string) {
	a := &fakeAgent{fault: fault, sent: map[string]bool{}}
	verbs := must(net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: control}))
	go a.acceptVerbs(verbs)
	l := must(net.ListenUnix(zds.Network, &net.UnixAddr{Net: zds.Network, Name: path}))
	for {
		c := must(l.AcceptUnix())
		k := &link{a: a, conn: c, updates: make(chan update, 100), gone: make(chan struct{}), busy: true}
		a.mu.Lock()
		a.links = append(a.links, k)
		a.mu.Unlock()
		go k.serve()
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return v
}

func (a *fakeAgent) is(fault string) bool { return a.fault == fault }

func (a *fakeAgent) patience() time.Duration {
	switch {
	case a.is("patient"):
		return time.Minute
	case a.is("impatient"):
		return time.Second
	}
	return 5 * time.Second
}

// serve is the life of a connection.
func (k *link) serve() {
	defer k.leave()
	if k.a.is("eager") && k.snapshot() != nil || !k.a.is("eager") && (k.hello() != nil || k.snapshot() != nil) {
		return
	}
	k.busy = false
	for start := time.Now(); ; {
		select {
		case u := <-k.updates:
			nack, err := k.update(u)
			if err != nil {
				u.answer <- "no answer: " + err.Error()
				if !k.a.is("patient-update") {
					return
				}
				continue
			}
			u.answer <- nack
			if nack != "" && k.a.is("nack-ends") {
				return
			}
		case <-time.After(100 * time.Millisecond):
			if k.a.is("no-probe") {
				continue
			}
			if _, err := k.read(10 * time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
				return
			}
			if k.a.is("chats") {
				k.request(zds.Keep("u1"), fdpass.NoFD)
			}
			if k.a.is("idle-ends") && time.Since(start) > 6*time.Second {
				return
			}
		}
	}
}

func (k *link) leave() {
	k.conn.Close()
	close(k.gone)
	if !k.a.is("never-forgets") {
		k.a.mu.Lock()
		k.a.links = slices.DeleteFunc(k.a.links, func(o *link) bool { return o == k })
		k.a.mu.Unlock()
	}
}

func (k *link) read(within time.Duration) (packet, error) {
	k.conn.SetReadDeadline(time.Now().Add(within))
	p, err := recvPacket(k.conn)
	if k.a.is("leaks") {
		k.a.mu.Lock()
		k.a.leaked = append(k.a.leaked, p.fds...)
		k.a.mu.Unlock()
	} else {
		p.close()
	}
	limit := zds.MaxPacket
	if k.a.is("small-buffer") {
		limit = 512
	}
	if err == nil && len(p.b) > limit && !k.a.is("any-answer") {
		err = errors.New("truncated")
	}
	return p, err
}

func (k *link) hello() error {
	p, err := k.read(k.a.patience())
	if err != nil || k.a.is("any-answer") {
		return err
	}
	v, err := zds.ParseHello(p.b)
	if k.a.is("judges-version") && v != zds.Version_V1 {
		return errors.New("version")
	}
	return err
}

func (k *link) snapshot() error {
	k.a.mu.Lock()
	pods := slices.Clone(k.a.pods)
	k.a.mu.Unlock()
	if k.a.is("snapshot-twice") {
		pods = append(pods, pods...)
	}
	for i, p := range pods {
		if k.a.is("snapshot-forgets") && i == 0 || k.a.is("snapshot-once") && k.a.sent[p.uid] {
			continue
		}
		k.a.sent[p.uid] = true
		if _, err := k.ask(k.add(p), k.fd(p)); err != nil {
			return err
		}
	}
	_, err := k.ask(zds.Snapshot(), fdpass.NoFD)
	return err
}

func (k *link) fd(p *toldPod) int {
	if k.a.is("not-a-netns") {
		return int(os.Stdin.Fd())
	}
	return p.fd
}

func (k *link) add(p *toldPod) *zds.WorkloadRequest {
	switch {
	case k.a.is("no-info"):
		return &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Add{Add: &zds.AddWorkload{Uid: p.uid}}}
	case k.a.is("no-account"):
		return zds.Add(p.uid, p.name, p.namespace, "")
	case k.a.is("swaps-names"):
		return zds.Add(p.uid, p.namespace, p.name, p.account)
	}
	return zds.Add(p.uid, p.name, p.namespace, p.account)
}

func (k *link) update(u update) (string, error) {
	if !u.del {
		return k.ask(k.add(u.p), k.fd(u.p))
	}
	switch {
	case k.a.is("del-with-fd"):
		return k.ask(zds.Del(u.p.uid), u.p.fd)
	case k.a.is("del-field"):
		if err := sendPacket(k.conn, uidField(2, 1, u.p.uid)); err != nil {
			return "", err
		}
		return k.answer()
	}
	return k.ask(zds.Del(u.p.uid), fdpass.NoFD)
}

func (k *link) request(req *zds.WorkloadRequest, fd int) error {
	b := encode(req)
	if k.a.is("unknown-field") {
		b = protowire.AppendVarint(protowire.AppendTag(b, 15, protowire.VarintType), 1)
	}
	switch {
	case fd != fdpass.NoFD && k.a.is("two-descriptors"):
		return sendPacket(k.conn, b, fd, fd)
	case fd != fdpass.NoFD && !k.a.is("no-descriptor"):
		return sendPacket(k.conn, b, fd)
	}
	return sendPacket(k.conn, b)
}

func (k *link) ask(req *zds.WorkloadRequest, fd int) (nack string, err error) {
	if err := k.request(req, fd); err != nil {
		return "", err
	}
	if k.a.is("no-wait") {
		return "", nil
	}
	nack, err = k.answer()
	if nack != "" && k.a.is("nack-ends-snapshot") {
		return "", errors.New(nack)
	}
	return nack, err
}

func (k *link) answer() (string, error) {
	patience := k.a.patience()
	p, err := k.read(patience)
	if err != nil {
		return "", err
	}
	nack, err := zds.ParseResponse(p.b)
	if k.a.is("any-answer") {
		return "", nil
	}
	return nack, err
}
