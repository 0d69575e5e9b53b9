#!/bin/busybox sh
# PID 1 of the Linux test guest: file systems, drivers, network; then the guest program for ever.
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs devtmpfs /dev
while read -r module; do
  $bb insmod "/modules/$module.ko"
done </modules/order
# An interface that is up has live virtqueues: device state that reads guest memory while it is
# loaded.
if [ -e /sys/class/net/eth0 ]; then
  $bb ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
fi
exec /bin/linux-guest
