package conformance

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/fresh"
	"ambient-emulator/internal/zds"
)

// The ports that ztunnel listens on in every pod (reference/sockets.md).
var ports = []int{15001, 15006, 15008}

// pod is a network namespace without a name, and who lives in it.
type pod struct {
	b    *bench
	ns   *netns.NS
	uid  string
	name string
	mine map[string]bool // inodes of the sockets that we have there
}

// What every pod of ours says of itself.
const (
	podNamespace      = "conformance"
	podServiceAccount = "sa"
)

// pod makes one for this scene, with lo up.
func (b *bench) pod() *pod {
	b.pods++
	name := fmt.Sprintf("%s-%d", strings.ReplaceAll(b.id, "/", "-"), b.pods)
	p := &pod{b: b, uid: b.prefix + "-" + name, name: name, mine: map[string]bool{}}
	var err error
	if p.ns, err = fresh.Make(); err != nil {
		b.notTried("make a network namespace: %v", err)
	}
	b.later(func() { p.ns.Close() })
	if _, err := p.ns.Do(fresh.LoUp); err != nil {
		b.notTried("set lo up in %v: %v", p.ns.ID(), err)
	}
	return p
}

// add is the request that asks ztunnel to serve the pod.
func (p *pod) add() *zds.WorkloadRequest {
	return zds.Add(p.uid, p.name, podNamespace, podServiceAccount)
}

// sockets returns the inodes of the listeners on ztunnel's ports.
func (p *pod) sockets() map[int]string {
	m := map[int]string{}
	for _, l := range p.listeners() {
		for _, port := range ports {
			if l.port == port {
				m[port] += l.inode + " "
			}
		}
	}
	return m
}

func (p *pod) isServed() bool { return len(p.sockets()) == len(ports) }

// served makes sure that all listeners are there: an ack was said, so now.
func (p *pod) served(when string) {
	if s := p.sockets(); len(s) != len(ports) {
		p.b.broken("%s: pod %s has listeners on %v, not on all of %v", when, p.uid, keys(s), ports)
	}
}

// left makes sure that no listener stays. A delete is not awaited, so: soon.
func (p *pod) left(when string) {
	if !p.b.until(soon, func() bool { return len(p.sockets()) == 0 }) {
		p.b.broken("%s: pod %s still has listeners on %v after %v", when, p.uid, keys(p.sockets()), soon)
	}
}

// same makes sure that the listeners are the very ones of before.
func (p *pod) same(before map[int]string, when string) {
	if now := p.sockets(); fmt.Sprint(now) != fmt.Sprint(before) {
		p.b.broken("%s: the listeners of pod %s are not the same sockets: port and inode were %v, are %v", when, p.uid, before, now)
	}
}

// occupy takes ztunnel's port in the pod, alone (no SO_REUSEPORT), until free.
func (p *pod) occupy(port int) (free func()) {
	var fd int
	_, err := p.ns.Do(func() (err error) {
		fd, err = occupy(port)
		return err
	})
	if err != nil {
		p.b.notTried("occupy port %d in %v: %v", port, p.ns.ID(), err)
	}
	var st unix.Stat_t
	unix.Fstat(fd, &st)
	p.mine[strconv.FormatUint(st.Ino, 10)] = true
	open := true
	free = func() {
		if open {
			open = false
			unix.Close(fd)
		}
	}
	p.b.later(free)
	return free
}

// occupy listens on the wildcard address of both families, or of IPv4.
func occupy(port int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	var addr unix.Sockaddr = &unix.SockaddrInet6{Port: port}
	if err == unix.EAFNOSUPPORT {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		addr = &unix.SockaddrInet4{Port: port}
	}
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(fd, addr); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(fd, 1); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("listen", err)
	}
	return fd, nil
}

func keys(m map[int]string) []int {
	ks := []int{}
	for _, port := range ports {
		if m[port] != "" {
			ks = append(ks, port)
		}
	}
	return ks
}
