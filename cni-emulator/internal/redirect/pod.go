package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/google/nftables"
	mdlayher "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// patience bounds each wait for the kernel's answer. It answers at once; but a
// program must not hang if it ever does not.
const patience = 10 * time.Second

// buffer is how much of a transaction may wait in a socket, in bytes: all of it on its
// way to the kernel, and then an answer to each of its messages. Of answers that found
// no room one would not know whether there are rules now.
const buffer = 4 << 20

// pod is a pod's namespace, reached over sockets that were opened inside.
type pod struct {
	id    netns.ID
	nft   *nftables.Conn
	links *netlink.Handle // links, routes, policy rules
	diag  *mdlayher.Conn  // sockets; nil if the kernel has no sock_diag(7)
	no6   bool            // the kernel has no IPv6
	off6  bool            // IPv6 is disabled on lo
}

// open opens a pod's sockets. ns stays the caller's; the pod is to be closed.
func open(ns *netns.NS) (*pod, error) {
	p := &pod{id: ns.ID()}
	_, err := ns.Do(p.openInside)
	if err != nil {
		p.close()
		return nil, lacks(err, "CAP_SYS_ADMIN")
	}
	return p, nil
}

// openInside runs in the pod: it opens sockets, and reads a file that shows each
// reader its own namespace.
func (p *pod) openInside() (err error) {
	p.nft, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *mdlayher.Conn) error {
		// A smaller one does for most pods; for many virtual interfaces it does not.
		c.SetReadBuffer(buffer)
		c.SetWriteBuffer(buffer)
		return c.SetDeadline(time.Now().Add(patience))
	}))
	if err != nil {
		if judge(err) == Absent {
			err = fmt.Errorf("%w: %v in this kernel: nftables (CONFIG_NF_TABLES)", err, Absent)
		}
		return fmt.Errorf("open a netlink socket of netfilter: %w", err)
	}
	if p.links, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open a netlink socket of routes: %w", err)
	}
	if err = p.links.SetSocketTimeout(patience); err != nil {
		return fmt.Errorf("set a netlink socket's timeout: %w", err)
	}
	// A kernel without it can't say who listens; then nobody asks.
	if p.diag, err = mdlayher.Dial(unix.NETLINK_SOCK_DIAG, nil); err != nil {
		p.diag = nil
	} else if err = p.diag.SetDeadline(time.Now().Add(patience)); err != nil {
		return fmt.Errorf("set a netlink socket's timeout: %w", err)
	}
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
	// Unreadable is as good as enabled, as in the real agent; but where there is
	// no such file there is no IPv6.
	p.off6 = err == nil && len(b) > 0 && b[0] == '1'
	p.no6 = errors.Is(err, fs.ErrNotExist)
	return nil
}

// close closes what open has opened, whatever that is.
func (p *pod) close() {
	if p.nft != nil {
		p.nft.CloseLasting()
	}
	if p.links != nil {
		p.links.Close()
	}
	if p.diag != nil {
		p.diag.Close()
	}
}
