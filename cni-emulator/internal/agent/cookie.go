package agent

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// cookieOf returns the number that the kernel gives a network namespace and
// never gives to another one until the next boot: SO_NETNS_COOKIE of any socket
// inside (socket(7), Linux 5.14). An inode would come back within a second.
//
// Making the socket inside needs CAP_SYS_ADMIN, which nothing else in the agent
// does.
func cookieOf(ns *netns.NS) (uint64, error) {
	var cookie uint64
	_, err := ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		defer unix.Close(fd)
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return os.NewSyscallError("getsockopt SO_NETNS_COOKIE", err)
	})
	return cookie, err
}

// bootID returns the number of this boot, or "" if nobody knows.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
