package netns

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrNotNetNS says that a descriptor is no network namespace; the error that
// wraps it says what it is instead.
var ErrNotNetNS = errors.New("not a network namespace")

// Judge tells which network namespace fd is, or with ErrNotNetNS that it is none.
// fd stays the caller's.
func Judge(fd int) (ID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return ID{}, os.NewSyscallError("fstat", err)
	}

	// Every namespace is a file of nsfs (namespaces(7)). Ask this first: on
	// another file system the ioctl's number could mean anything.
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return ID{}, os.NewSyscallError("fstatfs", err)
	}
	if fs.Type != unix.NSFS_MAGIC {
		return ID{}, fmt.Errorf("%w but %s", ErrNotNetNS, kind(st.Mode))
	}

	// ioctl_nsfs(2): which type of namespace? Before Linux 4.11 nobody could
	// say (ENOTTY); then setns refuses the wrong type with EINVAL.
	typ, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if errors.Is(err, unix.EBADF) {
		// fstat works with such a descriptor, setns does not (open(2)).
		return ID{}, fmt.Errorf("%w but a mere path, opened with O_PATH", ErrNotNetNS)
	}
	if err != nil && !errors.Is(err, unix.ENOTTY) {
		return ID{}, os.NewSyscallError("ioctl NS_GET_NSTYPE", err)
	}
	if err == nil && typ != unix.CLONE_NEWNET {
		return ID{}, fmt.Errorf("%w but a namespace of another type: %s", ErrNotNetNS, nsType(typ))
	}
	return ID{Dev: uint64(st.Dev), Ino: st.Ino}, nil
}

// kind names a file's type for a person.
func kind(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "a regular file"
	case unix.S_IFDIR:
		return "a directory"
	case unix.S_IFIFO:
		return "a pipe"
	case unix.S_IFSOCK:
		return "a socket"
	case unix.S_IFCHR, unix.S_IFBLK:
		return "a device"
	case 0:
		return "an anonymous file of the kernel (epoll, eventfd, pidfd, …)"
	}
	return fmt.Sprintf("a file of mode %#o", mode)
}

// nsType names what NS_GET_NSTYPE returned: the CLONE_NEW* flag of the type.
func nsType(typ int) string {
	switch typ {
	case unix.CLONE_NEWNS:
		return "mnt"
	case unix.CLONE_NEWUTS:
		return "uts"
	case unix.CLONE_NEWIPC:
		return "ipc"
	case unix.CLONE_NEWUSER:
		return "user"
	case unix.CLONE_NEWPID:
		return "pid"
	case unix.CLONE_NEWCGROUP:
		return "cgroup"
	case unix.CLONE_NEWTIME:
		return "time"
	}
	return fmt.Sprintf("clone flag %#x", typ)
}
