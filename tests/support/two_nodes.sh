# Two machines in one: two network namespaces with a cable between them, each with a name and an address of its own.
#
# Run as `unshare -rnump --fork --mount-proc --kill-child sh two_nodes.sh FOLDER CUT COMMAND…`: runs COMMAND on both from FOLDER, with
# NODE_RANK set to 0 and 1, and leaves what they said and how they ended in node<n>.log and node<n>.status. CUT: a file; when it appears,
# the cable is pulled.
folder=$1 cut=$2
shift 2
cd "$folder" || exit 1
printf '127.0.0.1 localhost\n192.168.1.1 node0\n192.168.1.2 node1\n' > hosts
mount --bind hosts /etc/hosts || exit 99
hostname node0
unshare -nu sleep 600 &
second=$!
while [ "$(readlink /proc/$second/ns/net)" = "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
ip link set lo up && ip link add eth0 type veth peer name eth0 netns "$second" || exit 99
ip addr add 192.168.1.1/24 dev eth0 && ip link set eth0 up || exit 99
nsenter -t "$second" -n -u sh -c 'hostname node1; ip link set lo up; ip addr add 192.168.1.2/24 dev eth0; ip link set eth0 up' || exit 99

NODE_RANK=0 sh -c '"$@" > node0.log 2>&1; echo $? $(date +%s) > node0.status' sh "$@" &
first_run=$!
NODE_RANK=1 nsenter -t "$second" -n -u sh -c '"$@" > node1.log 2>&1; echo $? $(date +%s) > node1.status' sh "$@" &
second_run=$!
while [ -d /proc/$first_run ] && [ ! -e node0.status ] && [ -n "$cut" ]; do
    if [ -e "$cut" ]; then
        date +%s > cut.time
        ip link set eth0 down
        break
    fi
    sleep 0.2
done
wait "$first_run" "$second_run"
