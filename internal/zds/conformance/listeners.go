package conformance

import (
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// listener is a listening TCP socket.
type listener struct {
	port     int
	wildcard bool
	inode    string
}

// listeners lists the listening sockets in the pod that are not ours, as `ss -ltn`
// does: /proc/net/tcp would walk the table of all connections of the machine, 5 ms
// a look.
func (p *pod) listeners() []listener {
	var fd int
	_, err := p.ns.Do(func() (err error) {
		// Which namespace it tells of is settled when it is made.
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		p.b.notTried("look into %v: %v", p.ns.ID(), err)
	}
	defer unix.Close(fd)
	var theirs []listener
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		all, err := dumpListeners(fd, family)
		if err != nil {
			p.b.notTried("list the listeners in %v: %v", p.ns.ID(), err)
		}
		for _, l := range all {
			if !p.mine[l.inode] {
				theirs = append(theirs, l)
			}
		}
	}
	return theirs
}

// What sock_diag(7) asks and answers with, in bytes.
const (
	diagRequest = unix.SizeofNlMsghdr + 56 // struct inet_diag_req_v2
	diagAnswer  = 72                       // struct inet_diag_msg
	tcpListen   = 10                       // TCP_LISTEN, a bit of idiag_states
)

// dumpListeners asks a sock_diag(7) socket for the listening TCP sockets of a family.
func dumpListeners(fd int, family byte) ([]listener, error) {
	req := make([]byte, diagRequest)
	order := binary.NativeEndian
	order.PutUint32(req[0:], diagRequest)
	order.PutUint16(req[4:], unix.SOCK_DIAG_BY_FAMILY)
	order.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	req[16], req[17] = family, unix.IPPROTO_TCP
	order.PutUint32(req[20:], 1<<tcpListen)
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, os.NewSyscallError("sendto", err)
	}
	var ls []listener
	for buf := make([]byte, 32<<10); ; {
		n, _, err := unix.Recvfrom(fd, buf, 0) // the kernel answers at once
		if err != nil {
			return nil, os.NewSyscallError("recvfrom", err)
		}
		msgs, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			return nil, fmt.Errorf("parse the kernel's answer: %w", err)
		}
		for _, m := range msgs {
			switch {
			case m.Header.Type == unix.NLMSG_DONE:
				return ls, nil
			case m.Header.Type == unix.NLMSG_ERROR && len(m.Data) >= 4:
				return nil, os.NewSyscallError("sock_diag", unix.Errno(-int32(order.Uint32(m.Data))))
			case len(m.Data) >= diagAnswer:
				ls = append(ls, parseListener(m.Data))
			}
		}
	}
}

// parseListener reads the port, the address and the inode of a struct inet_diag_msg.
func parseListener(b []byte) listener {
	wildcard := true
	for _, octet := range b[8:24] {
		wildcard = wildcard && octet == 0
	}
	inode := binary.NativeEndian.Uint32(b[68:])
	return listener{int(binary.BigEndian.Uint16(b[4:])), wildcard, strconv.FormatUint(uint64(inode), 10)}
}
