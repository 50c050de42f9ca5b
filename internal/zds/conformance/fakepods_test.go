package conformance

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

func (z *fakeZtunnel) reconcile() {
	for uid := range z.running {
		if !z.named[uid] {
			z.close(uid)
		}
	}
}

func (z *fakeZtunnel) close(uid string) {
	p := z.running[uid]
	if p == nil {
		return
	}
	for _, s := range p.socks {
		unix.Close(s)
	}
	if !z.is("leaks-del") {
		p.ns.Close()
	}
	delete(z.running, uid)
}

func (z *fakeZtunnel) del(uid string) {
	delete(z.named, uid)
	if p := z.pending[uid]; p != nil && !z.is("pending-deaf") {
		p.ns.Close()
		delete(z.pending, uid)
	}
	switch {
	case z.is("del-late") && z.done:
		if z.running[uid] != nil {
			z.close(uid)
			z.late, z.retry = append(z.late, uid), time.Now().Add(silence/2)
		}
	case z.done && !z.is("del-ignored"), !z.done && z.is("del-early"):
		z.close(uid)
	}
}

func (z *fakeZtunnel) add(uid string, fd int) bool {
	z.named[uid] = true
	ns, err := netns.FromFD(fd)
	if err != nil {
		if z.is("judges-early") {
			z.answer(nackRead + "not a network namespace")
			return false
		}
		z.answer(nackStart + "not a network namespace")
		return true
	}
	if old := z.running[uid]; old != nil && old.ns.ID() == ns.ID() && !z.is("restarts") {
		if z.is("leaks-repeat") {
			z.leaked = append(z.leaked, ns.FD())
		} else {
			ns.Close()
		}
		z.answer("")
		return true
	}
	if z.is("replace-ignored") && z.running[uid] != nil {
		ns.Close()
		z.answer("")
		return true
	}
	if !z.is("replace-leaves") {
		z.close(uid)
	}
	p := &fakePod{ns: ns}
	if err := z.start(p); err != nil {
		return z.failed(uid, p, err)
	}
	z.running[uid] = p
	if !z.is("pending-stays") {
		delete(z.pending, uid)
	}
	z.answer("")
	return true
}

func (z *fakeZtunnel) failed(uid string, p *fakePod, err error) bool {
	z.pending[uid] = p
	if z.retry.IsZero() {
		z.retry = time.Now().Add(retryAfter)
	}
	switch {
	case z.is("retries-at-once"):
		z.retry = time.Now().Add(500 * time.Millisecond)
	case z.is("no-retry"):
		z.retry = time.Time{}
	case z.is("start-class"):
		z.answer(nackRead + err.Error())
		return true
	}
	z.answer(nackStart + err.Error())
	return !z.is("start-drops")
}

// again is the one timer's expiry.
func (z *fakeZtunnel) again() {
	z.retry = time.Time{}
	for _, uid := range z.late {
		z.close(uid)
	}
	for uid, p := range z.pending {
		if z.start(p) == nil {
			z.running[uid] = p
			delete(z.pending, uid)
		}
	}
	if len(z.pending) > 0 && !z.is("retries-once") {
		z.retry = time.Now().Add(retryAfter)
	}
}

func (z *fakeZtunnel) start(p *fakePod) error {
	if z.is("no-listeners") {
		return nil
	}
	_, err := p.ns.Do(func() error {
		for _, port := range []int{15008, 15006, 15001} {
			s, err := z.listen(port)
			if err != nil {
				if !z.is("start-partial") {
					for _, s := range p.socks {
						unix.Close(s)
					}
				}
				p.socks = nil
				return fmt.Errorf("Bind([::]:%d, %w)", port, err)
			}
			p.socks = append(p.socks, s)
		}
		return nil
	})
	return err
}

func (z *fakeZtunnel) listen(port int) (int, error) {
	s, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	unix.SetsockoptInt(s, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	addr := &unix.SockaddrInet6{Port: port}
	if z.is("loopback") {
		addr.Addr[15] = 1
	}
	if err := errors.Join(unix.Bind(s, addr), unix.Listen(s, 16)); err != nil {
		unix.Close(s)
		return -1, err
	}
	return s, nil
}
