#!/bin/sh
# Installs what test hosts, the Verifier's tests and the package's checks need
# and this Debian 12 lacks. Nothing that it installs is started or left enabled here: services
# run in test hosts only. Quick when nothing is missing.
set -eu

packages="
systemd systemd-sysv systemd-container dbus dbus-daemon polkitd
libvirt-daemon libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients virtinst
qemu-system-x86 qemu-utils ovmf seabios swtpm swtpm-tools tpm2-tools
iproute2 e2fsprogs util-linux procps kmod
openssl strace lintian apparmor man-db dpkg-dev fakeroot rpm openssh-client
postgresql chromium fonts-dejavu-core prometheus
"

missing=
for p in $packages; do
	case $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null) in
	installed) ;;
	*) missing="$missing $p" ;;
	esac
done

# The guests' kernel is not installed, only unpacked: a machine's next boot is
# not ours to change. One that is installed will do.
kernels=/var/cache/virt-trust-lab
kernel=
for k in /boot/vmlinuz-*-cloud-amd64 "$kernels"/boot/vmlinuz-*-cloud-amd64; do
	[ ! -e "$k" ] || kernel=$k
done
[ -n "$missing" ] || [ -z "$kernel" ] || exit 0

if [ "$(id -u)" != 0 ]; then
	echo "test hosts need packages: run internal/lab/install-packages.sh as root" >&2
	exit 1
fi

get_kernel() {
	package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9]\)/\1/p' | head -n 1)
	[ -n "$package" ] || return 1
	tmp=$(mktemp -d)
	# _apt, who downloads, has to write there.
	chmod 777 "$tmp"
	if (cd "$tmp" && apt-get download -q "$package" >&2) && dpkg-deb -x "$tmp"/*.deb "$tmp/root"; then
		mkdir -p "$kernels"
		cp -a "$tmp/root/boot" "$tmp/root/lib" "$kernels/"
		rm -rf "$tmp"
	else
		rm -rf "$tmp"
		return 1
	fi
}
if [ -z "$kernel" ]; then
	echo "unpacking a kernel for guests into $kernels" >&2
	get_kernel || { apt-get update -q >&2 && get_kernel; }
fi
[ -n "$missing" ] || exit 0

echo "installing:$missing" >&2

# policy-rc.d (invoke-rc.d(8)) keeps maintainer scripts from starting services.
policy=/usr/sbin/policy-rc.d
saved=
if [ -e "$policy" ] || [ -L "$policy" ]; then
	saved=$(mktemp -u "$policy.XXXXXX")
	mv "$policy" "$saved"
fi
before=$(mktemp)
restore() {
	rm -f "$policy" "$before"
	[ -z "$saved" ] || mv "$saved" "$policy"
}
trap restore EXIT
trap 'exit 1' HUP INT TERM
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"
find /etc/systemd/system -type l 2>/dev/null | sort >"$before"

export DEBIAN_FRONTEND=noninteractive
install() {
	# shellcheck disable=SC2086
	apt-get install -y -q --no-install-recommends -o Dpkg::Use-Pty=0 \
		-o Dpkg::Options::=--force-confold $missing >&2
}
install || { apt-get update -q >&2 && install; }

# What the packages have just enabled would run after this machine's next boot.
find /etc/systemd/system -type l 2>/dev/null | sort | comm -13 "$before" - | while read -r link; do
	rm -f "$link"
done
